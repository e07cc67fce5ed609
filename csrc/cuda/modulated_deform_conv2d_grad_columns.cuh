// Backward, first part: the gradient of the columns, (pixels, taps, channels), as a matrix product
// of the output's gradient with the weights. It is kept in the columns' dtype, for a part of the
// images at a time, so that the buffer stays small and near the cache.

#pragma once

#include "modulated_deform_conv2d_math.cuh"

namespace d2det {

// kWarpsM x kWarpsN warps on kPixels x kChannels of the result.
template <int kPixelsOfTile, int kChannelsOfTile, int kWarpsAlongPixels, int kWarpsAlongChannels>
struct ProductTile {
  static constexpr int kPixels = kPixelsOfTile, kChannels = kChannelsOfTile;
  static constexpr int kWarpsM = kWarpsAlongPixels, kWarpsN = kWarpsAlongChannels;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN, kStages = 3;
  static constexpr int kM = kPixels / kWarpsM / 16, kN = kChannels / kWarpsN / 8;
  static constexpr int kRows = kPixels + kChannels;
  static constexpr int kStageBytes = kRows * kRowBytes;
  static_assert(kM >= 1 && kN >= 2 && kPixels * kRowUnits % kThreads == 0 &&
                kChannels * kRowUnits % kThreads == 0);
};

template <typename Math, typename Tile>
constexpr size_t column_gradient_shared_bytes() {
  const size_t pipeline = size_t{Tile::kStages} * Tile::kStageBytes;
  const size_t staging =
      size_t{Tile::kPixels} * (Tile::kChannels * sizeof(typename Math::Column) + kUnitBytes);
  return pipeline > staging ? pipeline : staging;
}

// Pixels [begin, end) of all, whose columns are written from the buffer's start.
struct PixelRange {
  int64_t begin, end;
};

// grad: rows of groups * row_out; weight: (groups, taps, group_in, row_out), both padded with zeros
// to row_out, a multiple of a unit.
// Grid: x: pixel tiles, then taps, then channel tiles, the last fastest; y: groups.
template <typename Math, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    column_gradient_kernel(const ConvProblem p, const typename Math::Column* __restrict__ grad,
                           const typename Math::Column* __restrict__ weight,
                           typename Math::Column* __restrict__ columns, PixelRange range,
                           int32_t row_out, int32_t channel_tiles) {
  using Column = typename Math::Column;
  using Sum = typename Math::Sum;
  D2DET_DYNAMIC_SHARED(unsigned char, shared);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int32_t group = blockIdx.y;
  const int32_t tile = blockIdx.x % channel_tiles;
  const int32_t tap = blockIdx.x / channel_tiles % p.taps();
  const int64_t first_pixel =
      range.begin + static_cast<int64_t>(blockIdx.x / channel_tiles / p.taps()) * Tile::kPixels;
  const int32_t first_channel = tile * Tile::kChannels;  // of the group

  const int unit = thread % kRowUnits, row0 = thread / kRowUnits;
  constexpr int kRowStep = Tile::kThreads / kRowUnits;
  const int32_t steps = (row_out + Math::kChunk - 1) / Math::kChunk;
  // The first of this thread's rows in either; the others follow at a constant distance.
  const int64_t grad_row = (first_pixel + row0) * p.groups + group;
  const int64_t weight_row =
      (static_cast<int64_t>(group) * p.taps() + tap) * p.group_in + first_channel + row0;
  const Column* const grad_from = grad + grad_row * row_out + unit * Math::kUnit;
  const Column* const weight_from = weight + weight_row * row_out + unit * Math::kUnit;
  const int32_t pixels_left =
      static_cast<int32_t>(min(range.end - first_pixel, static_cast<int64_t>(Tile::kPixels)));
  const int32_t channels_left = p.group_in - first_channel;
  const auto copy = [&](int32_t step) {
    if (step < steps) {
      unsigned char* const to = shared + step % Tile::kStages * Tile::kStageBytes;
      const int32_t output = step * Math::kChunk;
      const bool inside = output + unit * Math::kUnit < row_out;
#pragma unroll
      for (int row = row0; row < Tile::kPixels + row0; row += kRowStep) {
        const bool valid = inside && row < pixels_left;
        const Column* const from =
            grad_from + static_cast<int64_t>(row - row0) * p.groups * row_out + output;
        copy_async(to + unit_offset(row, unit), valid ? from : weight, valid);
      }
#pragma unroll
      for (int row = row0; row < Tile::kChannels + row0; row += kRowStep) {
        const bool valid = inside && row < channels_left;
        const Column* const from =
            weight_from + static_cast<int64_t>(row - row0) * row_out + output;
        copy_async(to + unit_offset(Tile::kPixels + row, unit), valid ? from : weight, valid);
      }
    }
    commit_copies();
  };

  Sum sum[Tile::kM][Tile::kN][4] = {};
  const int a_row = warp / Tile::kWarpsN * Tile::kM * 16;
  const int b_row = warp % Tile::kWarpsN * Tile::kN * 8;
  static_assert(Tile::kStages == 3);
  copy(0);
  copy(1);
  for (int32_t step = 0; step < steps; ++step) {
    wait_for_copies<1>();
    __syncthreads();
    copy(step + 2);
    const unsigned char* const a = shared + step % Tile::kStages * Tile::kStageBytes;
#pragma unroll
    for (int u = 0; u < kRowUnits; u += 2) {
      Math::template multiply<true>(sum, a, a_row, a + Tile::kPixels * kRowBytes, b_row, u);
    }
  }
  wait_for_copies<0>();
  __syncthreads();

  constexpr int kPitch = Tile::kChannels + Math::kUnit;
  Column* const staged = reinterpret_cast<Column*>(shared);
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = a_row + 16 * m + lane / 4 + i / 2 * 8;
        const int column = b_row + 8 * n + 2 * (lane % 4) + i % 2;
        staged[row * kPitch + column] = static_cast<Column>(sum[m][n][i]);
      }
    }
  }
  __syncthreads();
  constexpr int kUnits = Tile::kChannels / Math::kUnit;
  for (int i = thread; i < Tile::kPixels * kUnits; i += Tile::kThreads) {
    const int row = i / kUnits, place = i % kUnits * Math::kUnit;
    const int64_t pixel = first_pixel + row;
    const int32_t channel = first_channel + place;
    if (pixel >= range.end || channel >= p.group_in) continue;
    Column* const to = columns + ((pixel - range.begin) * p.taps() + tap) * p.channels +
                       group * p.group_in + channel;
    store_vector<Math::kUnit>(to, load_vector<Math::kUnit>(staged + row * kPitch + place));
  }
}

}  // namespace d2det
