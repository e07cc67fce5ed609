// Deformable RoI pooling on CUDA: what forward and backward share. A block serves some bins of one
// RoI and all channels. It first works out, once for each bin and axis, which pixels the bin reads
// and with what weight; points of a bin that read the same pixel are merged. Then each group of
// threads takes one bin at a time, each thread 16 bytes of neighbouring channels.

#pragma once

#include <string>
#include <vector>

#include "../bilinear.h"
#include "device.cuh"

namespace d2det::roi_pool {

constexpr int kThreads = 256;
constexpr int kMaxBins = 32;  // of a block: a warp moves one channel of them from or to NCHW
constexpr int kMaxLevels = 32;
constexpr size_t kTableBytes = 40 * 1024;  // of shared memory, for the bins' taps

struct Level {
  const void* features;  // (N, H, W, C)
  void* grad;            // the same shape, what scattered gradients are summed in
  int32_t height, width;
  double scale;
};

struct Levels {
  Level at[kMaxLevels];
};

template <typename A>
struct Arguments {
  const A* rois;          // (R, 5)
  const int64_t* levels;  // (R,)
  const A* offset;        // (R, 2, o, o) or null
  const A* modulation;    // (R, o, o) or null
  int64_t rois_count;
  int32_t images, level_count, channels, side, points;
  A gamma;
  RoiConvention convention;
  int32_t block_bins, block_tiles;  // bins of a block; blocks of a RoI
  bool channels_last;               // the format of the output or its gradient
};

// A pixel's row or column (a row times the map's width), and the factor it has on this axis.
template <typename A>
struct Tap {
  A weight, slope;
  int32_t index;
};

// The taps of a block's bins, in shared memory: for each bin first y, then x.
template <typename A>
struct Taps {
  Tap<A>* taps;
  int32_t* counts;
  int32_t capacity;  // for one bin and axis

  __device__ __forceinline__ Taps(unsigned char* memory, int32_t bins, int32_t points)
      : taps(reinterpret_cast<Tap<A>*>(memory)), capacity(2 * points) {
    counts = reinterpret_cast<int32_t*>(taps + 2 * bins * capacity);
  }
  __device__ __forceinline__ const Tap<A>* of(int bin, int axis) const {
    return taps + (2 * bin + axis) * capacity;
  }
  __device__ __forceinline__ int count(int bin, int axis) const { return counts[2 * bin + axis]; }
};

template <typename A>
__host__ __device__ __forceinline__ size_t taps_bytes(int32_t bins, int32_t points) {
  const size_t bytes = size_t(2) * bins * (sizeof(Tap<A>) * 2 * points + sizeof(int32_t));
  return (bytes + 15) / 16 * 16;
}

// Where a block is and what its RoI refers to.
template <typename A>
struct Place {
  int64_t roi;
  int32_t first_bin, bins;
  int32_t level, image;
  RoiSpan<A> y, x;

  // A RoI that refers to no image or level gets NaN coordinates, hence NaN results, at an image
  // that exists.
  __device__ __forceinline__ Place(const Levels& levels, const Arguments<A>& args) {
    roi = blockIdx.x / args.block_tiles;
    first_bin = static_cast<int32_t>(blockIdx.x % args.block_tiles) * args.block_bins;
    bins = min(args.block_bins, args.side * args.side - first_bin);
    const A* box = args.rois + 5 * roi;
    const int64_t wanted = args.levels[roi];
    // As conversion to an integer has it: towards zero. NaN fails.
    const bool valid =
        wanted >= 0 && wanted < args.level_count && box[0] > A(-1) && box[0] < A(args.images);
    level = valid ? static_cast<int32_t>(wanted) : 0;
    image = valid ? static_cast<int32_t>(box[0]) : 0;
    const A scale = valid ? static_cast<A>(levels.at[level].scale) : A(NAN);
    y = roi_span(box[2], box[4], scale, args.convention);
    x = roi_span(box[1], box[3], scale, args.convention);
    if (!valid) y = x = {A(NAN), A(NAN)};
  }
};

// Works out one bin's taps on one axis; returns their number.
template <typename A>
__device__ int find_taps(RoiSpan<A> span, int bin, A shift, int32_t size, int32_t stride,
                         const Arguments<A>& args, Tap<A>* taps) {
  const int points = args.points;
  int reading = points;
  if (args.convention == RoiConvention::kPsroi) {
    reading = 0;
    for (int p = 0; p < points; ++p) {
      const A at = roi_position(span, bin, args.side, p, points, shift, args.convention);
      reading += roi_reads(at, size, args.convention);
    }
  }
  const A full_share = A(1) / A(max(reading, 1));
  int count = 0;
  for (int p = 0; p < points; ++p) {
    const A at = roi_position(span, bin, args.side, p, points, shift, args.convention);
    const A share = roi_reads(at, size, args.convention) ? full_share : A(0);
    const Neighbours<A> near = roi_neighbours(at, size);
    const Tap<A> pair[2] = {
        {near.weight_low * share, near.slope_low * share, near.low * stride},
        {near.weight_high * share, near.slope_high * share, near.high * stride}};
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      int slot = count;
      // Points come in order, so that a pixel seen before was among the last few.
      for (int earlier = max(0, count - 3); earlier < count; ++earlier) {
        if (taps[earlier].index == pair[side].index) slot = earlier;
      }
      if (slot == count) {
        taps[count++] = pair[side];
      } else {
        taps[slot].weight += pair[side].weight;
        taps[slot].slope += pair[side].slope;
      }
    }
  }
  return count;
}

// Fills the taps of all bins of the block and waits for all threads.
template <typename A>
__device__ void fill_taps(const Taps<A>& table, const Place<A>& place, const Level& level,
                          const Arguments<A>& args) {
  const int area = args.side * args.side;
  for (int item = threadIdx.y * blockDim.x + threadIdx.x; item < 2 * place.bins;
       item += blockDim.x * blockDim.y) {
    const bool is_x = item % 2 != 0;
    const int bin = place.first_bin + item / 2;
    A shift = 0;
    if (args.offset != nullptr) {  // x before y
      shift = args.gamma * args.offset[(2 * place.roi + (is_x ? 0 : 1)) * area + bin];
    }
    table.counts[item] =
        find_taps(is_x ? place.x : place.y, is_x ? bin % args.side : bin / args.side, shift,
                  is_x ? level.width : level.height, is_x ? 1 : level.width, args,
                  table.taps + item * table.capacity);
  }
  __syncthreads();
}

// A tile of channels by bins in shared memory, through which NCHW memory is read and written in
// rows of bins while threads hold neighbouring channels of one bin. Channel i of vector v lies in
// row i * vectors + v, and rows are of odd length: neither side meets bank conflicts.
template <typename T, int V>
struct Stage {
  T* tile;
  int32_t pitch, vectors;

  __device__ __forceinline__ T& at(int vector, int i, int bin) const {
    return tile[(i * vectors + vector) * pitch + bin];
  }

  // Calls move(tile element, index in NCHW) for all of `channels` channels from `first` on.
  template <typename A, typename Move>
  __device__ __forceinline__ void move_all(const Place<A>& place, const Arguments<A>& args,
                                           int first, int channels, Move move) const {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const int64_t area = static_cast<int64_t>(args.side) * args.side;
    const int64_t start = (place.roi * args.channels + first) * area + place.first_bin;
    const int bin = thread % 32;
    if (bin >= place.bins) return;
    for (int c = thread / 32; c < channels; c += blockDim.x * blockDim.y / 32) {
      move(at(c / V, c % V, bin), start + c * area + bin);
    }
  }
};

// ---- Host ----

inline RoiConvention parse_convention(const std::string& name) {
  if (name == "aligned") return RoiConvention::kAligned;
  D2DET_CHECK(name == "psroi", "convention must be aligned or psroi, got ", name);
  return RoiConvention::kPsroi;
}

// Blocks of `x` threads along channels and `y` along bins.
inline dim3 block_shape(int64_t vectors) {
  unsigned x = 1;
  while (x < 32 && x < vectors) x *= 2;
  return dim3(x, kThreads / x);
}

template <typename A>
size_t stage_bytes(const Arguments<A>& args, unsigned vectors, size_t vector_bytes) {
  return args.channels_last ? 0 : vectors * vector_bytes * (args.block_bins | 1);
}

struct Tables {
  Tensor rois, levels, offset, modulation;  // in the accumulation type; empty: there is none
};

void check_arguments(const std::vector<Tensor>& features, const Tensor& rois, const Tensor& levels,
                     const std::optional<Tensor>& offset, const std::optional<Tensor>& modulation,
                     int64_t output_size, const std::vector<double>& spatial_scales,
                     int64_t sampling_ratio);

Tables make_tables(ScalarType type, const Tensor& rois, const Tensor& levels,
                   const std::optional<Tensor>& offset, const std::optional<Tensor>& modulation);

// Everything but the bins' distribution over blocks is given by the arguments of the operator.
template <typename A>
Arguments<A> make_arguments(const std::vector<Tensor>& features, const Tables& tables,
                            int64_t output_size, int64_t sampling_ratio, double gamma,
                            const std::string& convention, bool channels_last) {
  Arguments<A> args{};
  args.rois = tables.rois.const_data_ptr<A>();
  args.levels = tables.levels.const_data_ptr<int64_t>();
  args.offset = tables.offset.defined() ? tables.offset.const_data_ptr<A>() : nullptr;
  args.modulation = tables.modulation.defined() ? tables.modulation.const_data_ptr<A>() : nullptr;
  args.rois_count = tables.rois.size(0);
  args.images = static_cast<int32_t>(features[0].size(0));
  args.level_count = static_cast<int32_t>(features.size());
  args.channels = static_cast<int32_t>(features[0].size(1));
  args.side = static_cast<int32_t>(output_size);
  args.points = static_cast<int32_t>(sampling_ratio);
  args.gamma = static_cast<A>(gamma);
  args.convention = parse_convention(convention);
  args.channels_last = channels_last;
  const int64_t area = output_size * output_size;
  int64_t most = kMaxBins;
  while (most > 1 && taps_bytes<A>(static_cast<int32_t>(most), args.points) > kTableBytes) --most;
  args.block_tiles = static_cast<int32_t>(ceil_div(area, most));
  args.block_bins = static_cast<int32_t>(ceil_div(area, args.block_tiles));
  D2DET_CHECK(args.rois_count * args.block_tiles < (int64_t{1} << 31),
              "too many RoIs: ", args.rois_count);
  return args;
}

inline bool all_aligned(const std::vector<Tensor>& tensors) {
  for (const Tensor& t : tensors) {
    if (!aligned16(t.const_data_ptr())) return false;
  }
  return true;
}

}  // namespace d2det::roi_pool
