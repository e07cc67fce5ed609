// Included by kernels.h, once for each instruction set.
//
// A vector holds one pixel of as many channels, so that windows of any size are sums of vectors;
// planes in NCHW are transposed on their way in and out. All that lies between, for one vector of
// channels, stays in the first two levels of cache.

#include "adaptive_weighted_pool.h"
#include "simd_exp.h"
#include "simd_rows.h"

namespace d2det::D2DET_ISA {

template <typename T>
struct Weigher {
  using V = typename Vec<T>::type;
  T coefficient, largest;
  bool normalize;

  explicit Weigher(const WeightedPool& pool)
      : coefficient(static_cast<T>(pool.coefficient)),
        // exp(c s) is scaled by its largest value: ratios stay the same and nothing overflows.
        largest(pool.coefficient > 0 ? T(1) : T(0)),
        normalize(pool.normalize) {}

  inline __attribute__((always_inline)) V weight(V sigmoid) const {
    return normalize ? exponential((sigmoid - largest) * coefficient) : 2 * sigmoid;
  }
  // The derivative of the weight with respect to the logit.
  inline __attribute__((always_inline)) V slope(V sigmoid, V weight) const {
    return normalize ? sigmoid * (1 - sigmoid) * weight * coefficient : 2 * sigmoid * (1 - sigmoid);
  }
};

// The pixels [begin, end) that a window covers along one axis.
struct WindowRange {
  int64_t begin, end;
  WindowRange(int64_t index, const WeightedPool& pool, int64_t size) {
    begin = index * pool.stride - pool.padding;
    end = begin + pool.kernel_size;
    begin = begin < 0 ? 0 : begin;
    end = end > size ? size : end;
  }
};

// The windows [begin, end) that cover a pixel along one axis.
struct CoverRange {
  int64_t begin, end;
  CoverRange(int64_t pixel, const WeightedPool& pool, int64_t pooled) {
    const int64_t before = pixel + pool.padding - pool.kernel_size;
    begin = before < 0 ? 0 : before / pool.stride + 1;
    end = (pixel + pool.padding) / pool.stride + 1;
    end = end > pooled ? pooled : end;
  }
};

// Calls run(number of the window's vector, sum of weights, sum of weighted features).
template <typename T, typename Function>
inline __attribute__((always_inline)) void for_each_window(const WeightedPool& pool,
                                                           const T* weights, const T* values,
                                                           Function run) {
  using V = typename Vec<T>::type;
  constexpr int64_t kSize = Vec<T>::kSize;
  for (int64_t i = 0; i < pool.pooled_height; ++i) {
    const WindowRange rows(i, pool, pool.height);
    for (int64_t j = 0; j < pool.pooled_width; ++j) {
      const WindowRange columns(j, pool, pool.width);
      V total = {}, sum = {};
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        for (int64_t x = columns.begin; x < columns.end; ++x) {
          const int64_t at = (y * pool.width + x) * kSize;
          const V weight = load(weights + at);
          total += weight;
          sum += weight * load(values + at);
        }
      }
      run((i * pool.pooled_width + j) * kSize, total, sum);
    }
  }
}

template <typename T>
void weighted_pool(const WeightedPool& pool, const Pixels& features, const Pixels& logits,
                   const Pixels& output, int64_t channels, T* scratch) {
  constexpr int64_t kSize = Vec<T>::kSize;
  const int64_t pixels = pool.height * pool.width;
  const int64_t pooled = pool.pooled_height * pool.pooled_width;
  const T area = static_cast<T>(pool.kernel_size * pool.kernel_size);
  const Weigher<T> weigher(pool);
  T* values = scratch;
  T* weights = values + pixels * kSize;
  T* result = weights + pixels * kSize;
  for (int64_t c = 0; c < channels; c += kSize) {
    const int64_t some = channels - c < kSize ? channels - c : kSize;
    load_rows(features, c, some, 0, pixels, values, kSize);
    load_rows(logits, c, some, 0, pixels, weights, kSize);
    for (int64_t at = 0; at < pixels * kSize; at += kSize) {
      store(weights + at, weigher.weight(sigmoid(load(weights + at))));
    }
    for_each_window(pool, weights, values, [&](int64_t window, auto total, auto sum) {
      store(result + window, pool.normalize ? sum / total : sum / area);
    });
    store_rows(result, kSize, output, c, some, 0, pooled);
  }
}

// With S the sum of weights of a window, y its result and g its gradient, a pixel's share of the
// windows that cover it is A = sum g / S and B = sum g y / S; then df = w A and dw = f A - B.
template <typename T>
void weighted_pool_backward(const WeightedPool& pool, const Pixels& grad_output,
                            const Pixels& features, const Pixels& logits,
                            const Pixels& grad_features, const Pixels& grad_logits,
                            int64_t channels, T* scratch) {
  using V = typename Vec<T>::type;
  constexpr int64_t kSize = Vec<T>::kSize;
  const int64_t pixels = pool.height * pool.width;
  const int64_t pooled = pool.pooled_height * pool.pooled_width;
  const T area = static_cast<T>(pool.kernel_size * pool.kernel_size);
  const Weigher<T> weigher(pool);
  T* values = scratch;
  T* weights = values + pixels * kSize;
  T* slopes = weights + pixels * kSize;
  T* shares = slopes + pixels * kSize;  // A of each window
  T* owed = shares + pooled * kSize;    // B of each window
  for (int64_t c = 0; c < channels; c += kSize) {
    const int64_t some = channels - c < kSize ? channels - c : kSize;
    load_rows(features, c, some, 0, pixels, values, kSize);
    load_rows(logits, c, some, 0, pixels, weights, kSize);
    load_rows(grad_output, c, some, 0, pooled, shares, kSize);
    for (int64_t at = 0; at < pixels * kSize; at += kSize) {
      const V sigma = sigmoid(load(weights + at));
      const V weight = weigher.weight(sigma);
      store(weights + at, weight);
      store(slopes + at, weigher.slope(sigma, weight));
    }
    for_each_window(pool, weights, values, [&](int64_t window, V total, V sum) {
      const V grad = load(shares + window);
      const V share = pool.normalize ? grad / total : grad / area;
      store(shares + window, share);
      store(owed + window, pool.normalize ? share * (sum / total) : V{});
    });
    for (int64_t y = 0; y < pool.height; ++y) {
      const CoverRange rows(y, pool, pool.pooled_height);
      for (int64_t x = 0; x < pool.width; ++x) {
        const CoverRange columns(x, pool, pool.pooled_width);
        V share = {}, owing = {};
        for (int64_t i = rows.begin; i < rows.end; ++i) {
          for (int64_t j = columns.begin; j < columns.end; ++j) {
            const int64_t window = (i * pool.pooled_width + j) * kSize;
            share += load(shares + window);
            owing += load(owed + window);
          }
        }
        const int64_t at = (y * pool.width + x) * kSize;
        store(slopes + at, (load(values + at) * share - owing) * load(slopes + at));
        store(values + at, load(weights + at) * share);
      }
    }
    if (grad_features.data) store_rows(values, kSize, grad_features, c, some, 0, pixels);
    if (grad_logits.data) store_rows(slopes, kSize, grad_logits, c, some, 0, pixels);
  }
}

#define D2DET_INSTANTIATE(T)                                                                       \
  template void weighted_pool<T>(const WeightedPool&, const Pixels&, const Pixels&, const Pixels&, \
                                 int64_t, T*);                                                     \
  template void weighted_pool_backward<T>(const WeightedPool&, const Pixels&, const Pixels&,       \
                                          const Pixels&, const Pixels&, const Pixels&, int64_t,    \
                                          T*);
D2DET_INSTANTIATE(float)
D2DET_INSTANTIATE(double)
#undef D2DET_INSTANTIATE

}  // namespace d2det::D2DET_ISA
