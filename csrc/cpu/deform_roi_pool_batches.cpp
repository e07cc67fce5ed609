#include "deform_roi_pool_batches.h"

#include <limits>
#include <numeric>

namespace d2det {

void check_roi_arguments(const RoiArguments& args) {
  D2DET_CHECK(!args.features.empty() && args.features.size() == args.scales.size(),
              "features and spatial_scales must have one entry for each level, got ",
              args.features.size(), " and ", args.scales.size());
  const Tensor& first = args.features[0];
  for (const Tensor& map : args.features) {
    D2DET_CHECK(map.dim() == 4, "features must have 4 dimensions, got shape ", shape_text(map));
    check_floating("features", map, {first.size(0), first.size(1), -1, -1}, first);
    D2DET_CHECK(map.scalar_type() == first.scalar_type(), "features must share one dtype");
    D2DET_CHECK(map.size(2) > 0 && map.size(3) > 0, "features must not be empty, got shape ",
                shape_text(map));
    D2DET_CHECK(map.size(2) * map.size(3) < std::numeric_limits<int32_t>::max() &&
                    map.size(2) < (1 << 24) && map.size(3) < (1 << 24),
                "features are too large: shape ", shape_text(map));
  }
  const int64_t count = args.rois.size(0), o = args.output_size;
  check_floating("rois", args.rois, {count, 5}, first);
  check_indices("levels", args.levels, count, first);
  D2DET_CHECK(o >= 1 && o < (1 << 15), "output_size must be at least 1, got ", o);
  D2DET_CHECK(args.sampling_ratio >= 1 && args.sampling_ratio * o < (1 << 24),
              "sampling_ratio must be at least 1, got ", args.sampling_ratio);
  D2DET_CHECK(args.convention == "aligned" || args.convention == "psroi",
              "convention must be aligned or psroi, got ", args.convention);
  if (args.offset) check_floating("offset", *args.offset, {count, 2, o, o}, first);
  if (args.modulation) check_floating("modulation", *args.modulation, {count, 1, o, o}, first);
}

std::vector<RoiGroup> group_rois(const RoiArguments& args) {
  const Tensor rois = as(args.rois, ScalarType::Double), levels = as(args.levels, ScalarType::Long);
  const int64_t count = rois.size(0), images = args.images();
  const auto maps = static_cast<int64_t>(args.features.size());
  const double* roi = rois.const_data_ptr<double>();
  const int64_t* level = levels.const_data_ptr<int64_t>();
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::vector<double> top(count);
  std::vector<int64_t> group(count);
  for (int64_t r = 0; r < count; ++r) {
    const double image = roi[5 * r];
    // Truncated towards zero, as a conversion to an integer is; NaN fails.
    const bool valid =
        image > -1 && image < static_cast<double>(images) && level[r] >= 0 && level[r] < maps;
    D2DET_CHECK(valid, "rois and levels must refer to ", images, " images and ", maps,
                " levels, but RoI ", r, " has batch index ", image, " and level ", level[r]);
    group[r] = level[r] * images + static_cast<int64_t>(image);
    top[r] = roi[5 * r + 2] == roi[5 * r + 2] ? roi[5 * r + 2] : 0;  // NaN has no place
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return group[a] != group[b] ? group[a] < group[b] : top[a] < top[b];
  });
  std::vector<RoiGroup> groups;
  for (const int64_t r : order) {
    const int64_t image = group[r] % images;
    if (groups.empty() || groups.back().level != level[r] || groups.back().image != image) {
      groups.push_back({image, level[r], {}});
    }
    groups.back().members.push_back(r);
  }
  return groups;
}

}  // namespace d2det
