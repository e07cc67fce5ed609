// Adaptive weighted pooling on CUDA: what forward and backward share. A block holds whole planes (a
// RoI's channel) in shared memory, with every weight computed once; planes too large for that go
// through kernels without shared memory, which compute a weight again for each window it is in.

#pragma once

#include "device.cuh"

namespace d2det::weighted_pool {

constexpr int kThreads = 256;

// Division by a number that stays the same, by a multiplication; for values and divisors whose
// product is below 2^32.
struct Divisor {
  uint32_t divisor, factor;
  static Divisor of(int32_t value) {
    const auto divisor = static_cast<uint64_t>(value);
    return {static_cast<uint32_t>(value),
            static_cast<uint32_t>(((uint64_t{1} << 32) + divisor - 1) / divisor)};
  }
  __device__ __forceinline__ uint32_t divide(uint32_t value) const {
    return divisor == 1 ? value : __umulhi(value, factor);
  }
};

struct Window {
  int32_t kernel_size, stride, padding;
};

struct Settings {
  double coefficient;
  bool normalize;
  Window window;
};

struct Shape {
  int64_t planes;  // R * C
  int32_t channels, height, width, pooled_height, pooled_width;
  int32_t tile;       // planes of a block
  int32_t roi_tiles;  // channels last: blocks of a RoI
  bool vectors;       // whether tiles are read in vectors
  Divisor by_tile, by_pooled_area, by_pooled_width, by_area, by_width;

  __host__ __device__ __forceinline__ int32_t area() const { return height * width; }
  __host__ __device__ __forceinline__ int32_t pooled_area() const {
    return pooled_height * pooled_width;
  }
};

// A weight, and its derivative with respect to the logit.
template <typename A>
struct Weight {
  A value, slope;
};

// Rough functions where the result will be rounded to half precision.
template <bool kRough>
__device__ __forceinline__ float exponential(float value) {
  return kRough ? __expf(value) : expf(value);
}
template <bool kRough>
__device__ __forceinline__ double exponential(double value) {
  return exp(value);
}

// exp(coefficient * sigmoid) is scaled by its largest value: ratios stay the same and nothing
// overflows.
template <typename T>
__device__ __forceinline__ Weight<Accumulate<T>> weight_of(Accumulate<T> logit,
                                                           Accumulate<T> coefficient,
                                                           bool normalize) {
  using A = Accumulate<T>;
  constexpr bool kRough = sizeof(T) == 2;
  const A sigmoid = A(1) / (A(1) + exponential<kRough>(-logit));
  const A slope = sigmoid * (A(1) - sigmoid);
  if (!normalize) return {A(2) * sigmoid, A(2) * slope};
  const A largest = coefficient > A(0) ? A(1) : A(0);
  const A weight = exponential<kRough>(coefficient * (sigmoid - largest));
  return {weight, coefficient * slope * weight};
}

// A feature and its weight.
template <typename A>
struct alignas(2 * sizeof(A)) Pair {
  A feature, weight;
};

// kKernel > 0: the window is known to the compiler.
template <int kKernel, int kStride, int kPadding>
__device__ __forceinline__ Window known(Window window) {
  if constexpr (kKernel > 0) return {kKernel, kStride, kPadding};
  return window;
}

// The windows (begin to end, not included) that cover a row or column.
struct Range {
  int32_t begin, end;
};
__device__ __forceinline__ Range covering(int32_t at, Window window, int32_t pooled) {
  const int32_t last = (at + window.padding) / window.stride;
  // The first window is the first one whose end lies beyond `at`.
  const int32_t over = at + window.padding - window.kernel_size;
  const int32_t first = over < 0 ? 0 : over / window.stride + 1;
  return {first, min(last + 1, pooled)};
}

// ---- The tile of a block ----
// Elements of a tile are numbered as they lie in memory, so that the numbering of shared memory
// follows: NCHW tiles are one run of planes, channels-last tiles have for each pixel a run of
// channels.
template <bool kChannelsLast>
struct Tile {
  int64_t roi_start;  // channels last: the RoI's first element, in units of channels * area
  int64_t first;      // the first plane (NCHW) or channel (channels last)
  int32_t planes;     // how many planes the tile has

  __device__ __forceinline__ explicit Tile(const Shape& shape) {
    if constexpr (kChannelsLast) {
      roi_start = static_cast<int64_t>(blockIdx.x) / shape.roi_tiles;
      first = static_cast<int64_t>(blockIdx.x % shape.roi_tiles) * shape.tile;
      planes = min(shape.tile, shape.channels - static_cast<int32_t>(first));
    } else {
      roi_start = 0;
      first = static_cast<int64_t>(blockIdx.x) * shape.tile;
      const int64_t left = shape.planes - first;
      planes = left < shape.tile ? static_cast<int32_t>(left) : shape.tile;
    }
  }

  // Index in memory of element `item` of the tile's `area`-sized maps; -1: it is not there.
  __device__ __forceinline__ int64_t index(const Shape& shape, int32_t item, int32_t area) const {
    if constexpr (kChannelsLast) {
      const int32_t pixel = static_cast<int32_t>(shape.by_tile.divide(item));
      const int32_t channel = item - pixel * shape.tile;
      if (channel >= planes) return -1;
      return (roi_start * area + pixel) * shape.channels + first + channel;
    } else {
      return item < planes * area ? first * area + item : -1;
    }
  }
};

// Where in a plane an element of a tile is.
struct Position {
  int32_t plane, y, x;
};
template <bool kChannelsLast>
__device__ __forceinline__ Position position_in(const Shape& shape, int32_t item, int32_t area,
                                                const Divisor& by_area, const Divisor& by_width) {
  int32_t plane, pixel;
  if constexpr (kChannelsLast) {
    pixel = static_cast<int32_t>(shape.by_tile.divide(item));
    plane = item - pixel * shape.tile;
  } else {
    plane = static_cast<int32_t>(by_area.divide(item));
    pixel = item - plane * area;
  }
  const int32_t y = static_cast<int32_t>(by_width.divide(pixel));
  return {plane, y, pixel - y * static_cast<int32_t>(by_width.divisor)};
}

// The number in the tile of a position, in maps of the given size.
template <bool kChannelsLast>
__device__ __forceinline__ int32_t item_of(const Shape& shape, int32_t plane, int32_t pixel,
                                           int32_t area) {
  return kChannelsLast ? pixel * shape.tile + plane : plane * area + pixel;
}

// Calls use(item, feature, logit) for each element of the block's tile.
template <bool kChannelsLast, typename T, typename L, typename Use>
__device__ __forceinline__ void read_tile(const Shape& shape, const Tile<kChannelsLast>& tile,
                                          const T* features, const L* logits, Use use) {
  using A = Accumulate<T>;
  constexpr int V = sizeof(T) == 8 || sizeof(L) == 8 ? 2 : 4;
  const int32_t items = (kChannelsLast ? shape.tile : tile.planes) * shape.area();
  int32_t done = 0;
  if (shape.vectors) {
    done = items / V * V;
    for (int32_t item = threadIdx.x * V; item < done; item += blockDim.x * V) {
      const int64_t index = tile.index(shape, item, shape.area());
      if (index < 0) continue;
      const Vector<T, V> values = load_constant<V>(features + index);
      const Vector<L, V> raw = load_constant<V>(logits + index);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        use(item + k, to_float(values.data[k]), static_cast<A>(to_float(raw.data[k])));
      }
    }
  }
  for (int32_t item = done + threadIdx.x; item < items; item += blockDim.x) {
    const int64_t index = tile.index(shape, item, shape.area());
    if (index < 0) continue;
    use(item, to_float(features[index]), static_cast<A>(to_float(logits[index])));
  }
}

// The sum of the weights and of the weighted features of the window at (y, x).
template <typename A>
struct Sums {
  A weights, features;
};
template <bool kChannelsLast, typename A>
__device__ __forceinline__ Sums<A> window_sums(const Shape& shape, const Pair<A>* pairs,
                                               Position at, Window window) {
  Sums<A> sums{A(0), A(0)};
  const int32_t top = at.y * window.stride - window.padding;
  const int32_t left = at.x * window.stride - window.padding;
#pragma unroll
  for (int i = 0; i < window.kernel_size; ++i) {
#pragma unroll
    for (int j = 0; j < window.kernel_size; ++j) {
      const int32_t y = top + i, x = left + j;
      if (y < 0 || y >= shape.height || x < 0 || x >= shape.width) continue;
      const Pair<A> pair =
          pairs[item_of<kChannelsLast>(shape, at.plane, y * shape.width + x, shape.area())];
      sums.weights += pair.weight;
      sums.features += pair.weight * pair.feature;
    }
  }
  return sums;
}

// ---- Host ----

struct Operands {
  Tensor features, logits;  // in one memory format; logits of the features' dtype or float32
  bool channels_last;
};

inline Settings make_settings(double coefficient, int64_t kernel_size, int64_t stride,
                              int64_t padding, bool normalize) {
  const int64_t limit = int64_t{1} << 24;
  D2DET_CHECK(kernel_size > 0 && kernel_size < limit && stride > 0 && stride < limit &&
                  padding >= 0 && 2 * padding <= kernel_size,
              "kernel_size and stride must be positive and padding at most kernel_size / 2, got ",
              kernel_size, ", ", stride, ", ", padding);
  return {coefficient,
          normalize,
          {static_cast<int32_t>(kernel_size), static_cast<int32_t>(stride),
           static_cast<int32_t>(padding)}};
}

Operands check_and_arrange(const Tensor& features, const Tensor& logits, const Settings& settings);

// How many planes a block takes if each of their elements needs `element_bytes` of shared memory
// and each of the pooled ones `pooled_bytes`; 0: not even a few fit.
Shape make_shape(const Operands& operands, const Settings& settings, size_t element_bytes,
                 size_t pooled_bytes);

inline size_t tile_bytes(const Shape& shape, size_t element_bytes, size_t pooled_bytes) {
  return shape.tile * (shape.area() * element_bytes + shape.pooled_area() * pooled_bytes);
}

inline unsigned tile_count(const Shape& shape, const Operands& operands) {
  const int64_t count = operands.channels_last ? operands.features.size(0) * shape.roi_tiles
                                               : ceil_div(shape.planes, shape.tile);
  D2DET_CHECK(count < (int64_t{1} << 31), "too many planes: ", shape.planes);
  return static_cast<unsigned>(count);
}

// Calls f(T{}, L{}) with the element types of features and logits.
template <typename F>
void dispatch_operands(const Operands& operands, F f) {
  dispatch_floating(operands.features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (operands.logits.scalar_type() == operands.features.scalar_type()) {
      f(T{}, T{});
    } else if constexpr (sizeof(T) == 2) {
      f(T{}, float{});
    }
  });
}

// Calls f(channels last, kernel size, stride, padding) as compile-time numbers; 0: any window.
template <typename F>
void dispatch_window(bool channels_last, const Window& window, F f) {
  const bool usual = window.kernel_size == 3 && window.stride == 2 && window.padding == 1;
  using std::integral_constant;
  const auto with_layout = [&](auto layout) {
    if (usual) {
      f(layout, integral_constant<int, 3>{}, integral_constant<int, 2>{},
        integral_constant<int, 1>{});
    } else {
      f(layout, integral_constant<int, 0>{}, integral_constant<int, 0>{},
        integral_constant<int, 0>{});
    }
  };
  if (channels_last) {
    with_layout(std::true_type{});
  } else {
    with_layout(std::false_type{});
  }
}

}  // namespace d2det::weighted_pool
