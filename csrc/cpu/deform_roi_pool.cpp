// Deformable RoI pooling on CPU, forward. NCHW maps are copied into rows of channels, as many
// channels at a time as stay in cache; channels_last maps are read where they lie.

#include "deform_roi_pool_batches.h"

namespace d2det {
namespace {

template <typename T>
void pool(const RoiArguments& args, const Tensor& output) {
  const std::vector<RoiGroup> groups = group_rois(args);
  RoiPlanner<T> planner(args, groups, /*with_slopes=*/false);
  const MemoryFormat output_format = format_of(output);
  const RoiTensor target = roi_tensor(output, output_format);
  const auto pool_kernel = D2DET_SELECT_ISA(pool_rois<T>);
  const auto fill_kernel = D2DET_SELECT_ISA(fill_rows<T>);
  constexpr int64_t kTile = 4 * 64 / static_cast<int64_t>(sizeof(T));  // numbers of each bin

  int64_t rows_at = -1;  // the level whose map `features` is
  std::optional<Tensor> features;
  std::optional<Scratch<T>> rows;
  for (const RoiGroup& group : groups) {
    const Tensor& map = args.features[group.level];
    const MemoryFormat format = format_of(map);
    if (rows_at != group.level) features = as(map, map.scalar_type(), format);
    const RoiBatch<T> batch = planner.plan(group);
    const Pixels source = pixels_of(*features, format, group.image);
    const auto pool_channels = [&](const T* data, int64_t stride, int64_t first, int64_t some) {
      torch::stable::parallel_for(0, batch.count, 1, [&](int64_t begin, int64_t end) {
        const Scratch<T> tile(batch.bins() * kTile);
        pool_kernel(batch, {data, nullptr, stride}, target, first, some, begin, end, tile.get());
      });
    };
    if (is_rows<T>(*features, format)) {
      pool_channels(static_cast<const T*>(source.data), args.channels(), 0, args.channels());
      rows_at = group.level;
      continue;
    }
    const std::vector<RowSpan> spans = rows_read(batch);
    const int64_t stride = channels_in_cache(map, sizeof(T)), width = map.size(3);
    if (rows_at != group.level) {
      rows.reset();
      rows.emplace(map.size(2) * width * stride);
      use_large_pages(rows->get(), map.size(2) * width * stride * int64_t(sizeof(T)));
    }
    rows_at = group.level;
    for (int64_t first = 0; first < args.channels(); first += stride) {
      const int64_t some = std::min(stride, args.channels() - first);
      torch::stable::parallel_for(0, map.size(2), 1, [&](int64_t begin, int64_t end) {
        for (int64_t y = begin; y < end; ++y) {
          const RowSpan span = spans[y];
          if (span.begin >= span.end) continue;
          const int64_t at = y * width + span.begin;
          fill_kernel(source, first, some, at, span.end - span.begin, rows->get() + at * stride,
                      stride);
        }
      });
      pool_channels(rows->get(), stride, first, some);
    }
  }
}

Tensor deform_roi_pool(std::vector<Tensor> features, const Tensor& rois, const Tensor& levels,
                       std::optional<Tensor> offset, std::optional<Tensor> modulation,
                       int64_t output_size, std::vector<double> spatial_scales,
                       int64_t sampling_ratio, double gamma, std::string convention) {
  const RoiArguments args{features,    rois,           levels,         offset, modulation,
                          output_size, spatial_scales, sampling_ratio, gamma,  convention};
  check_roi_arguments(args);
  Tensor output =
      new_output(features[0], {rois.size(0), args.channels(), output_size, output_size});
  use_large_pages(output);
  if (args.accumulation() == ScalarType::Double) {
    pool<double>(args, output);
  } else {
    pool<float>(args, output);
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2det, CPU, m) { m.impl("deform_roi_pool", TORCH_BOX(&deform_roi_pool)); }

}  // namespace d2det
