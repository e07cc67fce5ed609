// The common part of deform_roi_pool and its backward: argument checks, and the RoIs sorted into
// batches of one image and one level, each with its plan.

#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "deform_roi_pool.h"
#include "pixels.h"

namespace d2det {

struct RoiArguments {
  const std::vector<Tensor>& features;
  const Tensor& rois;
  const Tensor& levels;
  const std::optional<Tensor>& offset;
  const std::optional<Tensor>& modulation;
  int64_t output_size;
  const std::vector<double>& scales;
  int64_t sampling_ratio;
  double gamma;
  const std::string& convention;

  int64_t images() const { return features[0].size(0); }
  int64_t channels() const { return features[0].size(1); }
  int64_t bins() const { return output_size * output_size; }
  ScalarType accumulation() const { return accumulation_type(features[0].scalar_type()); }
};

// RoIs of one image and one level, neighbours from top to bottom so that they share cache.
struct RoiGroup {
  int64_t image, level;
  std::vector<int64_t> members;
};

// Raises an error that names the argument, or the first RoI that refers to no image or level.
void check_roi_arguments(const RoiArguments& args);
std::vector<RoiGroup> group_rois(const RoiArguments& args);

// The pixels [begin, end) of one row of a map that are read at all.
struct RowSpan {
  int64_t begin, end;
};

// RoIs, offsets and modulation in the type T of sums, and memory for the plan of one group.
template <typename T>
class RoiPlanner {
 public:
  RoiPlanner(const RoiArguments& args, const std::vector<RoiGroup>& groups, bool with_slopes)
      : args_(args), with_slopes_(with_slopes) {
    const ScalarType type = args.accumulation();
    rois_ = as(args.rois, type);
    if (args.offset) offset_ = as(*args.offset, type);
    if (args.modulation) modulation_ = as(*args.modulation, type);
    int64_t most = 0;
    for (const RoiGroup& group : groups) {
      most = std::max(most, static_cast<int64_t>(group.members.size()));
    }
    const RoiBatch<T> any = batch({0, 0, {}});
    pixels_.emplace(most * 2 * any.entries() * any.pixel_step());
    weights_.emplace(most * 2 * any.entries() * any.weight_step());
    boxes_.emplace(most * 4);
  }

  // Valid until the next call.
  RoiBatch<T> plan(const RoiGroup& group) {
    RoiBatch<T> result = batch(group);
    result.pixels = pixels_->get();
    result.weights = weights_->get();
    result.boxes = boxes_->get();
    const auto kernel = D2DET_SELECT_ISA(plan_rois<T>);
    torch::stable::parallel_for(0, result.count, 4,
                                [&](int64_t begin, int64_t end) { kernel(result, begin, end); });
    return result;
  }

 private:
  RoiBatch<T> batch(const RoiGroup& group) const {
    const Tensor& map = args_.features[group.level];
    RoiBatch<T> result{};
    result.rois = rois_->template const_data_ptr<T>();
    result.offset = offset_ ? offset_->template const_data_ptr<T>() : nullptr;
    result.modulation = modulation_ ? modulation_->template const_data_ptr<T>() : nullptr;
    result.output_size = static_cast<int32_t>(args_.output_size);
    result.sampling_ratio = static_cast<int32_t>(args_.sampling_ratio);
    result.scale = static_cast<T>(args_.scales[group.level]);
    result.gamma = static_cast<T>(args_.gamma);
    result.convention =
        args_.convention == "psroi" ? RoiConvention::kPsroi : RoiConvention::kAligned;
    result.height = static_cast<int32_t>(map.size(2));
    result.width = static_cast<int32_t>(map.size(3));
    result.members = group.members.data();
    result.count = static_cast<int64_t>(group.members.size());
    result.with_slopes = with_slopes_;
    return result;
  }

  const RoiArguments& args_;
  bool with_slopes_;
  std::optional<Tensor> rois_, offset_, modulation_;
  std::optional<Scratch<int32_t>> pixels_, boxes_;
  std::optional<Scratch<T>> weights_;
};

// For each row of the map, what the RoIs of a planned batch read.
template <typename T>
std::vector<RowSpan> rows_read(const RoiBatch<T>& batch) {
  std::vector<RowSpan> spans(batch.height, {batch.width, 0});
  for (int64_t q = 0; q < batch.count; ++q) {
    const int32_t* box = batch.boxes + 4 * q;
    for (int64_t y = box[0]; y <= box[1]; ++y) {
      spans[y].begin = std::min<int64_t>(spans[y].begin, box[2]);
      spans[y].end = std::max<int64_t>(spans[y].end, box[3] + 1);
    }
  }
  return spans;
}

// Channels that are worked on in one go: whole vectors of any instruction set.
constexpr int64_t kRoiChannels = 16;

// How many channels of a map to copy into rows at a time: as many as stay in cache with all their
// pixels.
inline int64_t channels_in_cache(const Tensor& map, int64_t element_size) {
  // Fewer channels stay in cache better, but each pixel's visit then serves fewer vectors.
  constexpr int64_t kCacheBytes = 20 << 20;
  const int64_t fit = kCacheBytes / (map.size(2) * map.size(3) * element_size);
  const auto whole = [](int64_t n) { return (n + kRoiChannels - 1) / kRoiChannels * kRoiChannels; };
  const int64_t wanted = std::max(fit / kRoiChannels * kRoiChannels, kRoiChannels);
  return std::min(wanted, whole(map.size(1)));
}

// Whether kernels can read the map as it is: rows of whole vectors in the type T.
template <typename T>
bool is_rows(const Tensor& map, MemoryFormat format) {
  constexpr ScalarType kType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  return format == MemoryFormat::ChannelsLast && map.scalar_type() == kType &&
         map.size(1) % kRoiChannels == 0;
}

inline RoiTensor roi_tensor(const Tensor& value, MemoryFormat format) {
  const int64_t count = value.size(1) * value.size(2) * value.size(3);
  return {pixels_of(value, format, 0), count * static_cast<int64_t>(value.element_size())};
}

}  // namespace d2det
