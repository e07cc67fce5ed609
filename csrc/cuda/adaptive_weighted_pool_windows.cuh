// Adaptive weighted pooling of planes too large for shared memory: every thread computes the
// weights that it needs.

#pragma once

#include "adaptive_weighted_pool.cuh"

namespace d2det::weighted_pool {

// Which plane and pixel number `item` is of the elements in memory of maps of height x width.
struct Spot {
  int64_t roi, channel;
  int32_t y, x;

  __device__ __forceinline__ Spot(int64_t item, int32_t height, int32_t width, int32_t channels,
                                  bool channels_last) {
    if (channels_last) {
      channel = item % channels;
      item /= channels;
    }
    x = static_cast<int32_t>(item % width);
    item /= width;
    y = static_cast<int32_t>(item % height);
    item /= height;
    if (!channels_last) {
      channel = item % channels;
      item /= channels;
    }
    roi = item;
  }

  // The index in memory of another pixel of the same plane.
  __device__ __forceinline__ int64_t at(int32_t y, int32_t x, int32_t height, int32_t width,
                                        int32_t channels, bool channels_last) const {
    const int64_t pixel = static_cast<int64_t>(y) * width + x;
    const int64_t area = static_cast<int64_t>(height) * width;
    return channels_last ? (roi * area + pixel) * channels + channel
                         : (roi * channels + channel) * area + pixel;
  }
};

template <typename T, typename L>
__device__ Sums<Accumulate<T>> sums_of_window(const Shape& shape, const Settings& settings,
                                              const Spot& spot, const T* features, const L* logits,
                                              bool channels_last) {
  using A = Accumulate<T>;
  const Window& window = settings.window;
  Sums<A> sums{A(0), A(0)};
  const int32_t top = spot.y * window.stride - window.padding;
  const int32_t left = spot.x * window.stride - window.padding;
  for (int32_t y = max(top, 0); y < min(top + window.kernel_size, shape.height); ++y) {
    for (int32_t x = max(left, 0); x < min(left + window.kernel_size, shape.width); ++x) {
      const int64_t index = spot.at(y, x, shape.height, shape.width, shape.channels, channels_last);
      const A weight = weight_of<T>(static_cast<A>(to_float(logits[index])),
                                    static_cast<A>(settings.coefficient), settings.normalize)
                           .value;
      sums.weights += weight;
      sums.features += weight * to_float(features[index]);
    }
  }
  return sums;
}

}  // namespace d2det::weighted_pool
