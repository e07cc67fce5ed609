// Backward: the gradient of the input from that of the columns, with few atomic additions.
//
// The taps of neighbouring output pixels sample the same input pixels, each some 36 times over (3 x
// 3 taps of 4 corners). A block takes 8 x 8 output pixels, sorts what their taps owe by input pixel
// (a counting sort in shared memory), sums what each input pixel is owed in registers, and adds
// that to global memory once. Corners outside of the window of input pixels that is sorted are
// added one by one. The order of the sums depends on the run: deterministic mode is in
// modulated_deform_conv2d_grad_samples.cuh.

#pragma once

#include "modulated_deform_conv2d_grad_columns.cuh"

namespace d2det {

constexpr int kScatterThreads = 256, kScatterSide = 8, kScatterPixels = kScatterSide * kScatterSide;
constexpr int kScatterTaps = 9;  // at a time
constexpr int kWindowSide = 22;  // 3 x 3 taps of 8 x 8 pixels read 11 x 11; offsets move them by 5
constexpr int kWindowPixels = kWindowSide * kWindowSide;
constexpr int kBinsOfThread = 2, kBins = kScatterThreads * kBinsOfThread;
constexpr int kScatterPairs = kScatterPixels * kScatterTaps, kScatterEntries = 4 * kScatterPairs;
static_assert(kWindowPixels <= kBins);

// A row of the columns' gradient and its share in an input pixel.
template <typename Sum>
struct ScatterEntry {
  Sum weight;
  int32_t column;
};

template <typename Sum>
struct ScatterShared {
  ScatterEntry<Sum> entries[kScatterEntries];  // sorted, from the front; the far ones from the back
  int32_t far_pixels[kScatterEntries];         // of the far entries, in the same places
  int32_t starts[kBins + 1];                   // counts, at first
  int32_t warp_totals[kScatterThreads / 32];
  int32_t far;  // how many
};

// Counts become the places where the bins start.
template <typename Sum>
__device__ __forceinline__ void scan_bins(ScatterShared<Sum>& shared) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int32_t counts[kBinsOfThread], own = 0;
#pragma unroll
  for (int i = 0; i < kBinsOfThread; ++i) {
    counts[i] = shared.starts[thread * kBinsOfThread + i];
    own += counts[i];
  }
  int32_t upto = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t before = __shfl_up_sync(kFullWarp, upto, distance);
    if (lane >= distance) upto += before;
  }
  if (lane == 31) shared.warp_totals[warp] = upto;
  __syncthreads();
  int32_t start = upto - own;
  for (int i = 0; i < warp; ++i) start += shared.warp_totals[i];
#pragma unroll
  for (int i = 0; i < kBinsOfThread; ++i) {
    shared.starts[thread * kBinsOfThread + i] = start;
    start += counts[i];
  }
  if (thread == kScatterThreads - 1) shared.starts[kBins] = start;
}

// Grid: x: tiles of kScatterSide x kScatterSide output pixels of the images from `first_image` on;
// y: parts of the channels; z: offset groups. columns: from the first pixel of `first_image` on.
template <typename Math>
__global__ void __launch_bounds__(kScatterThreads, 3)
    scatter_kernel(const ConvProblem p, const typename Math::Column* __restrict__ columns,
                   const Coordinates offset, const Coordinates mask,
                   typename Math::Sum* __restrict__ grad_input, int64_t first_image,
                   int32_t channels_of_part) {
  using Sum = typename Math::Sum;
  constexpr int kUnit = Math::kUnit, kLanes = 8, kGroups = kScatterThreads / kLanes;
  constexpr int kPairsOfThread = (kScatterPairs + kScatterThreads - 1) / kScatterThreads;
  D2DET_DYNAMIC_SHARED(ScatterShared<Sum>, shared_memory);
  ScatterShared<Sum>& shared = *shared_memory;
  const int thread = threadIdx.x;

  const int32_t tiles_x = (p.out_width + kScatterSide - 1) / kScatterSide;
  const int32_t tiles_y = (p.out_height + kScatterSide - 1) / kScatterSide;
  const int32_t tile_x = blockIdx.x % tiles_x, tile_y = blockIdx.x / tiles_x % tiles_y;
  const int32_t local_image = blockIdx.x / tiles_x / tiles_y;
  const int64_t image = first_image + local_image;
  // The window's middle is that of what the tile reads with all offsets 0.
  const auto origin = [](int32_t tile, int32_t stride, int32_t padding, int32_t kernel,
                         int32_t dilation) {
    const int32_t extent = (kScatterSide - 1) * stride + (kernel - 1) * dilation + 2;
    return tile * kScatterSide * stride - padding + (extent - kWindowSide) / 2;
  };
  const int32_t origin_y = origin(tile_y, p.stride_y, p.padding_y, p.kernel_h, p.dilation_y);
  const int32_t origin_x = origin(tile_x, p.stride_x, p.padding_x, p.kernel_w, p.dilation_x);
  const int32_t offset_group = blockIdx.z;
  const int32_t begin = blockIdx.y * channels_of_part;
  const int32_t end = min(begin + channels_of_part, p.channels_per_offset_group);
  Sum* const pixels = grad_input + image * p.height * p.width * p.channels +
                      static_cast<int64_t>(offset_group) * p.channels_per_offset_group;
  const auto* const rows =
      columns + static_cast<int64_t>(offset_group) * p.channels_per_offset_group;

  for (int32_t first_tap = 0; first_tap < p.taps(); first_tap += kScatterTaps) {
    const int32_t pairs = min(kScatterTaps, p.taps() - first_tap) * kScatterPixels;
    __syncthreads();  // the last taps' entries are read
    for (int i = thread; i < kBins; i += kScatterThreads) shared.starts[i] = 0;
    if (thread == 0) shared.far = 0;
    __syncthreads();

    // Where each corner goes: bin and rank in it, or the rank among the far ones, or nowhere.
    int32_t bins[kPairsOfThread][4], ranks[kPairsOfThread][4];
    Sum weights[kPairsOfThread][4];
    int32_t column_rows[kPairsOfThread];
    constexpr int32_t kNowhere = -1, kFar = -2;  // kFar - pixel: to that pixel
#pragma unroll
    for (int j = 0; j < kPairsOfThread; ++j) {
      const int32_t pair = thread + j * kScatterThreads;
      const int32_t y = tile_y * kScatterSide + pair % kScatterPixels / kScatterSide;
      const int32_t x = tile_x * kScatterSide + pair % kScatterSide;
#pragma unroll
      for (int i = 0; i < 4; ++i) bins[j][i] = kNowhere;
      if (pair >= pairs || y >= p.out_height || x >= p.out_width) continue;
      const int32_t tap = first_tap + pair / kScatterPixels, place = y * p.out_width + x;
      column_rows[j] = (local_image * p.image_pixels() + place) * p.taps() + tap;
      const OutputPixel pixel(p, image * p.image_pixels() + place);
      Motion<Sum> motion;
      motion.load(p, pixel, offset, mask, tap, offset_group);
      const Axes<Sum> axes(p, pixel, tap, motion);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t at_y = i / 2 ? axes.y.high : axes.y.low;
        const int32_t at_x = i % 2 ? axes.x.high : axes.x.low;
        weights[j][i] = (i / 2 ? axes.y.weight_high : axes.y.weight_low) *
                        (i % 2 ? axes.x.weight_high : axes.x.weight_low) * motion.mask;
        if (weights[j][i] == Sum(0)) continue;  // outside of the map, mostly
        const int32_t window_y = at_y - origin_y, window_x = at_x - origin_x;
        if (window_y >= 0 && window_y < kWindowSide && window_x >= 0 && window_x < kWindowSide) {
          bins[j][i] = window_y * kWindowSide + window_x;
          ranks[j][i] = atomicAdd(&shared.starts[bins[j][i]], 1);
        } else {
          bins[j][i] = kFar - (at_y * p.width + at_x);
          ranks[j][i] = atomicAdd(&shared.far, 1);
        }
      }
    }
    __syncthreads();
    scan_bins(shared);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPairsOfThread; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t bin = bins[j][i];
        if (bin == kNowhere) continue;
        const int32_t to =
            bin >= 0 ? shared.starts[bin] + ranks[j][i] : kScatterEntries - 1 - ranks[j][i];
        shared.entries[to] = {weights[j][i], column_rows[j]};
        if (bin < 0) shared.far_pixels[to] = kFar - bin;
      }
    }
    __syncthreads();

    const int lane = thread % kLanes, group = thread / kLanes;
    for (int32_t channel = begin + lane * kUnit; channel < end; channel += kLanes * kUnit) {
      const auto add = [&](int32_t first, int32_t last, int64_t pixel) {
        Sum total[kUnit] = {};
#pragma unroll 4
        for (int32_t i = first; i < last; ++i) {
          const ScatterEntry<Sum> entry = shared.entries[i];
          Sum value[kUnit];
          widen<kUnit>(load_constant<kUnit>(rows + static_cast<int64_t>(entry.column) * p.channels +
                                            channel),
                       value);
#pragma unroll
          for (int e = 0; e < kUnit; ++e) total[e] += entry.weight * value[e];
        }
        atomic_add_vector<kUnit>(pixels + pixel * p.channels + channel, total);
      };
      for (int bin = group; bin < kWindowPixels; bin += kGroups) {
        const int32_t first = shared.starts[bin], last = shared.starts[bin + 1];
        if (first == last) continue;
        const int32_t y = origin_y + bin / kWindowSide, x = origin_x + bin % kWindowSide;
        add(first, last, static_cast<int64_t>(y) * p.width + x);
      }
      for (int32_t i = group; i < shared.far; i += kGroups) {
        const int32_t at = kScatterEntries - 1 - i;
        add(at, at + 1, shared.far_pixels[at]);
      }
    }
  }
}

}  // namespace d2det
