// Forward: an implicit matrix product. A block makes the columns of kPixels output pixels, a chunk
// of channels of one tap at a time, in shared memory, and multiplies them with the weights of
// kOutputs output channels. The columns never exist in global memory.

#pragma once

#include "modulated_deform_conv2d_math.cuh"

namespace d2det {

// kWarpsM x kWarpsN warps, each with a share of kPixels / kWarpsM by kOutputs / kWarpsN.
template <int kPixelsOfTile, int kOutputsOfTile, int kWarpsAlongPixels, int kWarpsAlongOutputs,
          int kBlocksPerMultiprocessor>
struct ForwardTile {
  static constexpr int kPixels = kPixelsOfTile, kOutputs = kOutputsOfTile;
  static constexpr int kWarpsM = kWarpsAlongPixels, kWarpsN = kWarpsAlongOutputs;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN, kMinBlocks = kBlocksPerMultiprocessor;
  static constexpr int kM = kPixels / kWarpsM / 16, kN = kOutputs / kWarpsN / 8;
  static constexpr int kGathers = kPixels * kRowUnits / kThreads;  // units of each thread
  static constexpr int kStageBytes = (kPixels + kOutputs) * kRowBytes;
  static_assert(kM >= 1 && kN >= 2 && kGathers >= 1 && kOutputs * kRowUnits >= kThreads &&
                kPixels <= kThreads);
};

// One element of padding keeps pixels on different banks when read down a column; channels-last
// rows are read as units of 16 bytes.
template <typename T>
constexpr int output_pitch(int outputs, bool channels_last) {
  return outputs + (channels_last ? kVectorSize<T> : 4 / static_cast<int>(sizeof(T)));
}

template <typename Math, typename Tile, typename Output>
constexpr size_t forward_shared_bytes() {
  const size_t pipeline =
      2 * (Tile::kStageBytes + Tile::kPixels * sizeof(Corners<typename Math::Sum>));
  const size_t staging =
      sizeof(Output) * Tile::kPixels * output_pitch<Output>(Tile::kOutputs, true);
  return pipeline > staging ? pipeline : staging;
}

template <typename Output, typename Sum>
struct ForwardResult {
  Output* output;      // in the memory format that `channels_last` states
  const Output* bias;  // or null
  Sum* partial;        // null, or (splits, pixels, out_channels): sums over a part of the taps
  bool channels_last;
};

// The accumulators to the partial sums of this split.
template <typename Tile, typename Sum>
__device__ __forceinline__ void store_partial(const ConvProblem& p,
                                              const Sum (&sum)[Tile::kM][Tile::kN][4], Sum* partial,
                                              int64_t first_pixel, int32_t first_output,
                                              int32_t group) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = warp / Tile::kWarpsN * Tile::kM * 16 + lane / 4;
  const int column0 = warp % Tile::kWarpsN * Tile::kN * 8 + 2 * (lane % 4);
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t pixel = first_pixel + row0 + 16 * m + i / 2 * 8;
        const int32_t output = first_output + column0 + 8 * n + i % 2;
        if (pixel < p.pixels && output < p.group_out) {
          partial[pixel * p.out_channels + group * p.group_out + output] = sum[m][n][i];
        }
      }
    }
  }
}

// The accumulators to the output, by way of shared memory, so that neighbours write neighbours.
template <typename Tile, typename Output, typename Sum>
__device__ __forceinline__ void store_output(const ConvProblem& p,
                                             const Sum (&sum)[Tile::kM][Tile::kN][4],
                                             const ForwardResult<Output, Sum>& result,
                                             unsigned char* shared, int64_t first_pixel,
                                             int32_t first_output, int32_t group) {
  Output* const staged = reinterpret_cast<Output*>(shared);
  const int pitch = output_pitch<Output>(Tile::kOutputs, result.channels_last);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = warp / Tile::kWarpsN * Tile::kM * 16 + lane / 4;
  const int column0 = warp % Tile::kWarpsN * Tile::kN * 8 + 2 * (lane % 4);
  const int32_t outputs = min(Tile::kOutputs, p.group_out - first_output);
  const int32_t channel0 = group * p.group_out + first_output;
#pragma unroll
  for (int n = 0; n < Tile::kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = column0 + 8 * n + i % 2;
      Sum bias = 0;
      if (result.bias && column < outputs) bias = to_float(result.bias[channel0 + column]);
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m) {
        staged[(row0 + 16 * m + i / 2 * 8) * pitch + column] =
            from_float<Output>(sum[m][n][i] + bias);
      }
    }
  }
  __syncthreads();
  if (result.channels_last) {
    constexpr int kVector = kVectorSize<Output>;
    if (p.out_channels % kVector == 0 && p.group_out % kVector == 0) {
      constexpr int kUnits = Tile::kOutputs / kVector;
      for (int i = threadIdx.x; i < Tile::kPixels * kUnits; i += Tile::kThreads) {
        const int row = i / kUnits, column = i % kUnits * kVector;
        const int64_t pixel = first_pixel + row;
        if (pixel >= p.pixels || column >= outputs) continue;
        store_vector<kVector>(result.output + pixel * p.out_channels + channel0 + column,
                              load_vector<kVector>(staged + row * pitch + column));
      }
      return;
    }
    for (int i = threadIdx.x; i < Tile::kPixels * Tile::kOutputs; i += Tile::kThreads) {
      const int row = i / Tile::kOutputs, column = i % Tile::kOutputs;
      const int64_t pixel = first_pixel + row;
      if (pixel >= p.pixels || column >= outputs) continue;
      result.output[pixel * p.out_channels + channel0 + column] = staged[row * pitch + column];
    }
    return;
  }
  static_assert(Tile::kThreads % Tile::kPixels == 0);  // each thread keeps to one pixel
  const int row = threadIdx.x % Tile::kPixels;
  if (first_pixel + row >= p.pixels) return;
  const OutputPixel pixel(p, first_pixel + row);
  Output* const to =
      result.output + (pixel.image * p.out_channels + channel0) * p.image_pixels() + pixel.place;
  for (int column = threadIdx.x / Tile::kPixels; column < outputs;
       column += Tile::kThreads / Tile::kPixels) {
    to[static_cast<int64_t>(column) * p.image_pixels()] = staged[row * pitch + column];
  }
}

// Grid: x: pixel tiles times output tiles, the latter faster, so that blocks that read the same
// pixels run together; y: groups; z: splits of the taps.
// weight: (groups, taps, group_out, group_in).
template <typename Math, typename Tile, typename Output>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    forward_kernel(const ConvProblem p, const typename Math::Column* __restrict__ input,
                   const Coordinates offset, const Coordinates mask,
                   const typename Math::Column* __restrict__ weight,
                   const ForwardResult<Output, typename Math::Sum> result, int32_t output_tiles,
                   int32_t taps_per_split) {
  using Column = typename Math::Column;
  using Sum = typename Math::Sum;
  using Cursor = ChunkCursor<Math::kChunk>;
  D2DET_DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* const columns = shared;  // two stages of each
  unsigned char* const weights = shared + 2 * Tile::kPixels * kRowBytes;
  auto* const corners = reinterpret_cast<Corners<Sum>*>(shared + 2 * Tile::kStageBytes);

  const int thread = threadIdx.x, warp = thread / 32;
  const int32_t group = blockIdx.y;
  const int64_t first_pixel = static_cast<int64_t>(blockIdx.x / output_tiles) * Tile::kPixels;
  const int32_t first_output = static_cast<int32_t>(blockIdx.x % output_tiles) * Tile::kOutputs;
  const Column* const images = input + p.image_of(first_pixel) * p.height * p.width * p.channels;
  const int32_t first_tap = blockIdx.z * taps_per_split;
  const int32_t last_tap = min(first_tap + taps_per_split, p.taps());

  const bool has_pixel = thread < Tile::kPixels;
  // Where the pixel lies is found anew for each tap, which is rare, rather than kept in registers.
  Motion<Sum> motion;
  const auto load_motion = [&](const Cursor& at) {
    const OutputPixel pixel(p, first_pixel + opaque(thread));
    motion.load(p, pixel, offset, mask, at.tap, at.channel / p.channels_per_offset_group);
  };
  const auto set_corners = [&](const Cursor& at) {
    const OutputPixel pixel(p, first_pixel + opaque(thread));
    corners[at.segment % 2 * Tile::kPixels + thread].set(p, pixel, p.image_of(first_pixel), at.tap,
                                                         motion);
  };

  // A thread always moves the same unit of rows that are kThreads / 8 apart.
  const int unit = thread % kRowUnits, row0 = thread / kRowUnits;
  constexpr int kRowStep = Tile::kThreads / kRowUnits;
  Samples<Math> samples;
  const auto gather = [&](const Cursor& at, int i) {
    const int32_t channel = at.channel + unit * Math::kUnit;
    const auto& from = corners[at.segment % 2 * Tile::kPixels + row0 + i * kRowStep];
    if (channel < at.end) {
      samples.load(images + channel, from, p.channels);
    } else {
      samples.clear();
    }
  };
  const auto put = [&](const Cursor& at, int stage, int i) {
    const int row = row0 + i * kRowStep;
    samples.store(corners[at.segment % 2 * Tile::kPixels + row],
                  columns + stage * Tile::kPixels * kRowBytes + unit_offset(row, unit));
  };
  const int32_t outputs_left = p.group_out - first_output - row0;
  const auto copy_weights = [&](const Cursor& at, int stage) {
    unsigned char* const to = weights + stage * Tile::kOutputs * kRowBytes;
    const int32_t channel = at.channel + unit * Math::kUnit;
    const int64_t row =
        (static_cast<int64_t>(group) * p.taps() + at.tap) * p.group_out + first_output + row0;
    const Column* const from = weight + row * p.group_in + (channel - group * p.group_in);
#pragma unroll
    for (int i = 0; i < Tile::kOutputs; i += kRowStep) {
      const bool valid = i < outputs_left && channel < at.end;
      copy_async(to + unit_offset(row0 + i, unit),
                 valid ? from + static_cast<int64_t>(i) * p.group_in : weight, valid);
    }
    commit_copies();
  };

  Cursor next(p, group, first_tap);
  Cursor ahead = next;
  if (has_pixel) {
    load_motion(next);
    set_corners(next);
  }
  if (ahead.advance(p, group) && ahead.tap < last_tap && has_pixel) {
    load_motion(ahead);
    set_corners(ahead);
  }
  copy_weights(next, 0);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Tile::kGathers; ++i) {
    gather(next, i);
    put(next, 0, i);
  }
  next = ahead;
  wait_for_copies<0>();
  __syncthreads();

  Sum sum[Tile::kM][Tile::kN][4] = {};
  const int a_row = warp / Tile::kWarpsN * Tile::kM * 16;
  const int b_row = warp % Tile::kWarpsN * Tile::kN * 8;
  bool more = true;
  for (int stage = 0; more; stage ^= 1) {
    more = next.tap < last_tap;
    const bool new_corners = ahead.advance(p, group) && ahead.tap < last_tap && has_pixel;
    if (new_corners) load_motion(ahead);
    if (more) copy_weights(next, 1 - stage);
    const unsigned char* const a = columns + stage * Tile::kPixels * kRowBytes;
    const unsigned char* const b = weights + stage * Tile::kOutputs * kRowBytes;
    // Each gather's loads are on their way while the tensor cores take their share of this chunk.
    constexpr int kParts = Tile::kGathers < 4 ? Tile::kGathers : 4;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      constexpr int kGathersOfPart = Tile::kGathers / kParts;
      if (more) gather(next, part * kGathersOfPart);
#pragma unroll
      for (int k = 4 / kParts * part; k < 4 / kParts * (part + 1); ++k) {
        Math::template multiply<false>(sum, a, a_row, b, b_row, 2 * k);
      }
      if (more) {
        put(next, 1 - stage, part * kGathersOfPart);
#pragma unroll
        for (int i = part * kGathersOfPart + 1; i < (part + 1) * kGathersOfPart; ++i) {
          gather(next, i);
          put(next, 1 - stage, i);
        }
      }
    }
    if (new_corners) set_corners(ahead);
    next = ahead;
    wait_for_copies<0>();
    __syncthreads();
  }

  if (result.partial) {
    store_partial<Tile>(p, sum, result.partial + blockIdx.z * p.pixels * p.out_channels,
                        first_pixel, first_output, group);
  } else {
    store_output<Tile>(p, sum, result, shared, first_pixel, first_output, group);
  }
}

// Sums the splits in their order: output (any of the two memory formats) from (splits, pixels,
// out_channels).
template <typename Output, typename Sum>
__global__ void sum_splits_kernel(const ConvProblem p, const ForwardResult<Output, Sum> result,
                                  int32_t splits) {
  const int64_t count = p.pixels * p.out_channels;
  D2DET_GRID_STRIDE(index, count) {
    const int64_t pixel = index / p.out_channels;
    const int32_t channel = static_cast<int32_t>(index - pixel * p.out_channels);
    Sum total = 0;
    for (int32_t i = 0; i < splits; ++i) total += result.partial[i * count + index];
    if (result.bias) total += to_float(result.bias[channel]);
    int64_t to = index;
    if (!result.channels_last) {
      const int64_t image = pixel / p.image_pixels();
      to = (image * p.out_channels + channel) * p.image_pixels() + pixel - image * p.image_pixels();
    }
    result.output[to] = from_float<Output>(total);
  }
}

}  // namespace d2det
