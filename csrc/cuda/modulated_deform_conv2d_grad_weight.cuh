// Backward, third part: the gradient of the weights, a matrix product of the output's gradient with
// the columns, which are gathered again. The pixels are summed in parts, and the parts in a fixed
// order: the result is the same from run to run.

#pragma once

#include "modulated_deform_conv2d_layout.cuh"

namespace d2det {

// kWarpsM x kWarpsN warps on kOutputs x kInputs channels of one tap.
template <int kOutputsOfTile, int kInputsOfTile, int kWarpsAlongOutputs, int kWarpsAlongInputs>
struct WeightTile {
  static constexpr int kOutputs = kOutputsOfTile, kInputs = kInputsOfTile;
  static constexpr int kWarpsM = kWarpsAlongOutputs, kWarpsN = kWarpsAlongInputs;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kM = kOutputs / kWarpsM / 16, kN = kInputs / kWarpsN / 8;
  static_assert(kM >= 1 && kN >= 2);
};

// Both tiles are flat: a row for each pixel of a step.
template <typename Math, typename Tile>
struct WeightStep {
  using Column = typename Math::Column;
  static constexpr int kBytes = 16 * 1024;  // of the wider of the two
  static constexpr int kWide = Tile::kOutputs > Tile::kInputs ? Tile::kOutputs : Tile::kInputs;
  static constexpr int kPixels = kBytes / (kWide * sizeof(Column));
  static constexpr int kPitchA = Tile::kOutputs * sizeof(Column) + Math::kFlatPadding;
  static constexpr int kPitchB = Tile::kInputs * sizeof(Column) + Math::kFlatPadding;
  static constexpr int kStageBytes = kPixels * (kPitchA + kPitchB);
  static constexpr int kUnitsA = Tile::kOutputs / Math::kUnit,
                       kUnitsB = Tile::kInputs / Math::kUnit;
  static constexpr int kCopies = kPixels * kUnitsA / Tile::kThreads;
  static constexpr int kGathers = kPixels * kUnitsB / Tile::kThreads;
  static constexpr int kParts = kPixels / Math::kDepth;
  static_assert(kPixels <= Tile::kThreads && kCopies >= 1 && kGathers >= 1 && kParts >= 1);
  static_assert(Tile::kThreads % kUnitsA == 0 && Tile::kThreads % kUnitsB == 0);
  static constexpr size_t kSharedBytes =
      2 * (kStageBytes + kPixels * sizeof(Corners<typename Math::Sum>));
};

// grad: rows of groups * row_out. partial: (splits, groups, taps, group_out, group_in).
// Grid: x: output tiles, then tiles of input channels, then taps, the first fastest; y: groups; z:
// splits of the pixels, `steps_per_split` steps each.
template <typename Math, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    weight_gradient_kernel(const ConvProblem p, const typename Math::Column* __restrict__ grad,
                           const typename Math::Column* __restrict__ input,
                           const Coordinates offset, const Coordinates mask,
                           typename Math::Sum* __restrict__ partial, int32_t row_out,
                           int32_t output_tiles, int32_t input_tiles, int64_t steps_per_split) {
  using Column = typename Math::Column;
  using Sum = typename Math::Sum;
  using Step = WeightStep<Math, Tile>;
  D2DET_DYNAMIC_SHARED(unsigned char, shared);
  auto* const corners = reinterpret_cast<Corners<Sum>*>(shared + 2 * Step::kStageBytes);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int32_t group = blockIdx.y;
  const int32_t first_output = static_cast<int32_t>(blockIdx.x % output_tiles) * Tile::kOutputs;
  const int32_t tap = blockIdx.x / output_tiles / input_tiles;
  // The tile's channels have one offset group; a group may end before the last of the tiles.
  ChunkCursor<Tile::kInputs> place(p, group, tap);
  for (int32_t i = blockIdx.x / output_tiles % input_tiles; i > 0; --i) {
    place.advance(p, group);
    if (place.tap != tap) return;
  }
  const int32_t first_input = place.channel, end_input = place.end;
  const int32_t offset_group = first_input / p.channels_per_offset_group;

  const int64_t begin = blockIdx.z * steps_per_split * Step::kPixels;
  const int64_t limit = begin + steps_per_split * Step::kPixels;
  const int64_t end = limit < p.pixels ? limit : p.pixels;

  const bool has_pixel = thread < Step::kPixels;
  Motion<Sum> motion;
  // A step's corners count their rows from the step's own first image.
  const auto load_motion = [&](int64_t first_pixel) {
    const OutputPixel pixel(p, first_pixel + thread);
    motion.load(p, pixel, offset, mask, tap, offset_group);
  };
  const auto set_corners = [&](int64_t first_pixel, int stage) {
    const OutputPixel pixel(p, first_pixel + thread);
    corners[stage * Step::kPixels + thread].set(p, pixel, p.image_of(first_pixel), tap, motion);
  };
  const auto images = [&](int64_t first_pixel) {
    return input + p.image_of(first_pixel) * p.height * p.width * p.channels;
  };

  const auto copy_grad = [&](int64_t first_pixel, int stage) {
    unsigned char* const to = shared + stage * Step::kStageBytes;
    const int unit = thread % Step::kUnitsA;
    const int32_t output = first_output + unit * Math::kUnit;
#pragma unroll
    for (int i = 0; i < Step::kCopies; ++i) {
      const int row = thread / Step::kUnitsA + i * (Tile::kThreads / Step::kUnitsA);
      const int64_t pixel = first_pixel + row;
      const bool valid = pixel < end && output < row_out;
      const Column* const from = grad + (pixel * p.groups + group) * row_out + output;
      copy_async(to + row * Step::kPitchA + unit * kUnitBytes, valid ? from : grad, valid);
    }
    commit_copies();
  };
  const int unit = thread % Step::kUnitsB, row0 = thread / Step::kUnitsB;
  constexpr int kRowStep = Tile::kThreads / Step::kUnitsB;
  const int32_t channel = first_input + unit * Math::kUnit;
  Samples<Math> samples;
  const auto gather = [&](const Column* from, int stage, int i) {
    if (channel < end_input) {
      samples.load(from + channel, corners[stage * Step::kPixels + row0 + i * kRowStep],
                   p.channels);
    } else {
      samples.clear();
    }
  };
  const auto put = [&](int stage, int i) {
    const int row = row0 + i * kRowStep;
    samples.store(corners[stage * Step::kPixels + row],
                  shared + stage * Step::kStageBytes + Step::kPixels * Step::kPitchA +
                      row * Step::kPitchB + unit * kUnitBytes);
  };

  if (has_pixel) {
    load_motion(begin);
    set_corners(begin, 0);
    if (begin + Step::kPixels < end) {
      load_motion(begin + Step::kPixels);
      set_corners(begin + Step::kPixels, 1);
    }
  }
  copy_grad(begin, 0);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Step::kGathers; ++i) {
    gather(images(begin), 0, i);
    put(0, i);
  }
  wait_for_copies<0>();
  __syncthreads();

  Sum sum[Tile::kM][Tile::kN][4] = {};
  const int a_column = warp / Tile::kWarpsN * Tile::kM * 16;
  const int b_column = warp % Tile::kWarpsN * Tile::kN * 8;
  int stage = 0;
  for (int64_t first = begin; first < end; first += Step::kPixels, stage ^= 1) {
    const int64_t next = first + Step::kPixels, ahead = next + Step::kPixels;
    const bool more = next < end;
    const bool new_corners = has_pixel && ahead < end;
    if (new_corners) load_motion(ahead);
    if (more) copy_grad(next, 1 - stage);
    const Column* const from = images(more ? next : begin);
    const unsigned char* const a = shared + stage * Step::kStageBytes;
    const unsigned char* const b = a + Step::kPixels * Step::kPitchA;
    // As in the forward: a gather is on its way during a part of the products.
    constexpr int kTurns = Step::kGathers < Step::kParts ? Step::kGathers : Step::kParts;
    constexpr int kGathersOfTurn = Step::kGathers / kTurns, kPartsOfTurn = Step::kParts / kTurns;
    static_assert(kGathersOfTurn * kTurns == Step::kGathers &&
                  kPartsOfTurn * kTurns == Step::kParts);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (more) gather(from, 1 - stage, turn * kGathersOfTurn);
#pragma unroll
      for (int k = turn * kPartsOfTurn; k < (turn + 1) * kPartsOfTurn; ++k) {
        Math::multiply_flat(sum, a, Step::kPitchA, a_column, b, Step::kPitchB, b_column,
                            k * Math::kDepth);
      }
      if (more) {
        put(1 - stage, turn * kGathersOfTurn);
#pragma unroll
        for (int i = turn * kGathersOfTurn + 1; i < (turn + 1) * kGathersOfTurn; ++i) {
          gather(from, 1 - stage, i);
          put(1 - stage, i);
        }
      }
    }
    if (new_corners) set_corners(ahead, stage);
    wait_for_copies<0>();
    __syncthreads();
  }

  const int64_t block = (static_cast<int64_t>(blockIdx.z) * p.groups + group) * p.taps() + tap;
  Sum* const to = partial + block * p.group_out * p.group_in - group * p.group_in;
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t output = first_output + a_column + 16 * m + lane / 4 + i / 2 * 8;
        const int32_t at = first_input + b_column + 8 * n + 2 * (lane % 4) + i % 2;
        if (output < p.group_out && at < end_input) {
          to[static_cast<int64_t>(output) * p.group_in + at] = sum[m][n][i];
        }
      }
    }
  }
}

// torch's (out, in / source_groups, taps) from the sums of the parts, in their order.
template <typename Sum, typename To>
__global__ void sum_weight_gradient_kernel(const Sum* __restrict__ partial, To* __restrict__ to,
                                           WeightLayout layout, int32_t splits, int64_t count) {
  const int64_t part =
      static_cast<int64_t>(layout.groups) * layout.taps * layout.group_out * layout.group_in;
  D2DET_GRID_STRIDE(index, count) {
    const int64_t pair = index / layout.taps;
    const int32_t tap = static_cast<int32_t>(index - pair * layout.taps);
    const int64_t output = pair / layout.source_in;
    const int32_t group = static_cast<int32_t>(output / layout.group_out);
    const int32_t row =
        static_cast<int32_t>(output - static_cast<int64_t>(group) * layout.group_out);
    // The channel among those of the merged group.
    const int32_t input = static_cast<int32_t>(pair - output * layout.source_in) +
                          row / layout.source_out * layout.source_in;
    const int64_t from =
        ((static_cast<int64_t>(group) * layout.taps + tap) * layout.group_out + row) *
            layout.group_in +
        layout.cells.target(input);
    Sum total = 0;
    for (int32_t i = 0; i < splits; ++i) total += partial[i * part + from];
    to[index] = from_float<To>(total);
  }
}

}  // namespace d2det
