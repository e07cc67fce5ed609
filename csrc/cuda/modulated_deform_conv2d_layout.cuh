// Between torch's layouts and those of the kernels: feature maps as rows of pixels, channels last;
// weights with the tap first.
//
// Where the runs of channels that have one offset group and one weight group ("cells") are no whole
// number of units of 16 bytes, rows and weights are padded with zeros: `cell` channels become
// `padded_cell`. Every kernel then reads whole units, aligned.

#pragma once

#include "device.cuh"
#include "modulated_deform_conv2d_math.cuh"

namespace d2det {

struct Cells {
  int32_t size, padded;

  // The source's channel, or -1 for padding.
  __device__ __forceinline__ int32_t source(int32_t channel) const {
    const int32_t cell = channel / padded, place = channel - cell * padded;
    return place < size ? cell * size + place : -1;
  }
  __device__ __forceinline__ int32_t target(int32_t channel) const {
    const int32_t cell = channel / size;
    return cell * padded + channel - cell * size;
  }
};

constexpr int kTransposeSide = 32, kTransposeRows = 8;

// Rows (images * pixels, row_channels) from images of `channels`, NCHW or channels-last.
// Grid: x: tiles of pixels of one image; y: tiles of row channels; z: images, with a stride.
template <typename From, typename To>
__global__ void rows_from_images_kernel(const From* __restrict__ from, To* __restrict__ to,
                                        int64_t images, int64_t pixels, int32_t channels,
                                        int32_t row_channels, Cells cells, bool channels_last) {
  __shared__ To tile[kTransposeSide][kTransposeSide + 1];
  const int lane = threadIdx.x % kTransposeSide, first = threadIdx.x / kTransposeSide;
  const int64_t pixel0 = static_cast<int64_t>(blockIdx.x) * kTransposeSide;
  const int32_t channel0 = blockIdx.y * kTransposeSide;
  for (int64_t image = blockIdx.z; image < images; image += gridDim.z) {
    if (!channels_last) {
      __syncthreads();
      for (int i = first; i < kTransposeSide; i += kTransposeRows) {
        const int32_t channel = channel0 + i;
        const int32_t source = channel < row_channels ? cells.source(channel) : -1;
        const int64_t pixel = pixel0 + lane;
        if (pixel < pixels) {
          tile[i][lane] =
              source < 0
                  ? To(0)
                  : static_cast<To>(to_float(from[(image * channels + source) * pixels + pixel]));
        }
      }
      __syncthreads();
    }
    for (int i = first; i < kTransposeSide; i += kTransposeRows) {
      const int64_t pixel = pixel0 + i;
      const int32_t channel = channel0 + lane;
      if (pixel >= pixels || channel >= row_channels) continue;
      To value(0);
      if (channels_last) {
        const int32_t source = cells.source(channel);
        if (source >= 0) {
          value = static_cast<To>(to_float(from[(image * pixels + pixel) * channels + source]));
        }
      } else {
        value = tile[lane][i];
      }
      to[(image * pixels + pixel) * row_channels + channel] = value;
    }
  }
}

// Images of `channels`, NCHW or channels-last, from rows (images * pixels, row_channels): the way
// back, without the padding. Same grid, with tiles of the images' channels.
template <typename From, typename To>
__global__ void images_from_rows_kernel(const From* __restrict__ from, To* __restrict__ to,
                                        int64_t images, int64_t pixels, int32_t channels,
                                        int32_t row_channels, Cells cells, bool channels_last) {
  __shared__ To tile[kTransposeSide][kTransposeSide + 1];
  const int lane = threadIdx.x % kTransposeSide, first = threadIdx.x / kTransposeSide;
  const int64_t pixel0 = static_cast<int64_t>(blockIdx.x) * kTransposeSide;
  const int32_t channel0 = blockIdx.y * kTransposeSide;
  for (int64_t image = blockIdx.z; image < images; image += gridDim.z) {
    __syncthreads();
    for (int i = first; i < kTransposeSide; i += kTransposeRows) {
      const int64_t pixel = pixel0 + i;
      const int32_t channel = channel0 + lane;
      if (pixel >= pixels || channel >= channels) continue;
      const To value = from_float<To>(static_cast<Accumulate<To>>(
          from[(image * pixels + pixel) * row_channels + cells.target(channel)]));
      if (channels_last) {
        to[(image * pixels + pixel) * channels + channel] = value;
      } else {
        tile[i][lane] = value;
      }
    }
    if (channels_last) continue;
    __syncthreads();
    for (int i = first; i < kTransposeSide; i += kTransposeRows) {
      const int64_t pixel = pixel0 + lane;
      const int32_t channel = channel0 + i;
      if (pixel >= pixels || channel >= channels) continue;
      to[(image * channels + channel) * pixels + pixel] = tile[lane][i];
    }
  }
}

// How the weights of torch, (out, in / source_groups, taps), lie in those of the kernels.
struct WeightLayout {
  int32_t taps, groups, group_out, group_in;  // group_in: padded
  int32_t source_out, source_in;              // channels of one of torch's groups
  Cells cells;

  // Index in torch's weights; -1 where the kernels' have a zero: padding, or a pair of channels of
  // different groups that were merged into one.
  __device__ __forceinline__ int64_t source(int32_t group, int32_t tap, int32_t output,
                                            int32_t input) const {
    if (output >= group_out) return -1;
    const int32_t channel = cells.source(input);
    if (channel < 0 || output / source_out != channel / source_in) return -1;
    const int64_t out = static_cast<int64_t>(group) * group_out + output;
    return (out * source_in + channel % source_in) * taps + tap;
  }
};

// (groups, taps, group_out, group_in) or, transposed, (groups, taps, group_in, row_out), from
// torch's; rounded as tiles are.
template <typename Math, typename From, bool kTransposed>
__global__ void pack_weights_kernel(const From* __restrict__ from,
                                    typename Math::Column* __restrict__ to, WeightLayout layout,
                                    int32_t row_out) {
  const int32_t rows = kTransposed ? layout.group_in : layout.group_out;
  const int32_t row_length = kTransposed ? row_out : layout.group_in;
  const int64_t count = static_cast<int64_t>(layout.groups) * layout.taps * rows * row_length;
  D2DET_GRID_STRIDE(index, count) {
    const int64_t row_index = index / row_length;
    const int32_t place = static_cast<int32_t>(index - row_index * row_length);
    const int64_t block = row_index / rows;
    const int32_t row = static_cast<int32_t>(row_index - block * rows);
    const int32_t group = static_cast<int32_t>(block / layout.taps);
    const int32_t tap = static_cast<int32_t>(block - static_cast<int64_t>(group) * layout.taps);
    const int64_t source =
        layout.source(group, tap, kTransposed ? place : row, kTransposed ? row : place);
    to[index] = source < 0 ? typename Math::Column(0) : Math::round(to_float(from[source]));
  }
}

}  // namespace d2det
