// Between NCHW and channels-last memory, changing the dtype on the way: what torch's own copy does
// too, without going through a tile of shared memory.

#pragma once

#include "device.cuh"

namespace d2det {

constexpr int kTransposeSide = 32;

// (batch, rows, columns) to (batch, columns, rows); 32 x 8 threads.
template <typename From, typename To>
__global__ void __launch_bounds__(256)
    transpose(const From* input, To* output, int64_t rows, int64_t columns) {
  __shared__ From tile[kTransposeSide][kTransposeSide + 1];
  const int64_t tiles_across = (columns + kTransposeSide - 1) / kTransposeSide;
  const int64_t tiles_down = (rows + kTransposeSide - 1) / kTransposeSide;
  const int64_t left = blockIdx.x % tiles_across * kTransposeSide;
  const int64_t top = blockIdx.x / tiles_across % tiles_down * kTransposeSide;
  const int64_t matrix = blockIdx.x / tiles_across / tiles_down * rows * columns;
  for (int i = threadIdx.y; i < kTransposeSide; i += 8) {
    const int64_t row = top + i, column = left + threadIdx.x;
    if (row < rows && column < columns) {
      tile[i][threadIdx.x] = input[matrix + row * columns + column];
    }
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kTransposeSide; i += 8) {
    const int64_t row = top + threadIdx.x, column = left + i;
    if (row < rows && column < columns) {
      output[matrix + column * rows + row] =
          static_cast<To>(static_cast<Accumulate<To>>(to_float(tile[threadIdx.x][i])));
    }
  }
}

template <typename From, typename To>
void launch_transpose(const Tensor& input, const Tensor& output, int64_t batch, int64_t rows,
                      int64_t columns) {
  const int64_t tiles = batch * ceil_div(rows, kTransposeSide) * ceil_div(columns, kTransposeSide);
  D2DET_CHECK(tiles < (int64_t{1} << 31), "too large a tensor: ", shape_text(input));
  D2DET_LAUNCH((transpose<From, To>), static_cast<unsigned>(tiles), dim3(kTransposeSide, 8), 0,
               current_stream(input), input.const_data_ptr<From>(), output.mutable_data_ptr<To>(),
               rows, columns);
}

// An empty channels-last tensor with the shape of `like`; the strides are those of `like` where
// they will do.
inline Tensor empty_channels_last(const Tensor& like, ScalarType type) {
  if (like.scalar_type() == type && is_channels_last(like)) return torch::stable::empty_like(like);
  const auto sizes = like.sizes();
  return torch::stable::empty(std::vector<int64_t>(sizes.begin(), sizes.end()), type, std::nullopt,
                              like.device(), std::nullopt, MemoryFormat::ChannelsLast);
}

// (N, C, H, W) with the same values, channels last; itself if it is.
inline Tensor to_channels_last(const Tensor& value) {
  if (is_channels_last(value)) return value;
  if (!value.is_contiguous()) return torch::stable::contiguous(value, MemoryFormat::ChannelsLast);
  const Tensor result = empty_channels_last(value, value.scalar_type());
  dispatch_floating(value.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_transpose<T, T>(value, result, value.size(0), value.size(1),
                           value.size(2) * value.size(3));
  });
  return result;
}

// Channels-last `value`, in the accumulation type of `like`, as a tensor like `like`; itself if
// nothing changes.
template <typename A>
Tensor from_channels_last(const Tensor& value, const Tensor& like) {
  if (value.scalar_type() == like.scalar_type() && is_channels_last(like)) return value;
  Tensor result = torch::stable::empty_like(like);
  if (!result.is_contiguous() || is_channels_last(result)) {
    torch::stable::copy_(result, value);
    return result;
  }
  dispatch_floating(like.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<Accumulate<T>, A>) {
      launch_transpose<A, T>(value, result, like.size(0), like.size(2) * like.size(3),
                             like.size(1));
    }
  });
  return result;
}

}  // namespace d2det
