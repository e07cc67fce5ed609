// The backward of deformable RoI pooling; included by kernels.h, once for each instruction set,
// behind deform_roi_pool_kernel.h, whose plan and reads it uses.

namespace d2det::D2DET_ISA {

// The gradient of kVectors vectors of channels of one bin. Products with the pixels are kept as
// vectors and added up over the lanes at the end.
template <int kVectors, bool kDots, bool kScatter, typename T>
inline __attribute__((always_inline)) void scatter_bin(const Reads<T>& y, const Reads<T>& x,
                                                       T modulation, const RoiMap<T>& map,
                                                       int64_t channel, const T* grad,
                                                       typename Vec<T>::type* sums) {
  using V = typename Vec<T>::type;
  constexpr int64_t kSize = Vec<T>::kSize;
  V g[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) g[v] = load(grad + v * kSize);
  for (int32_t a = 0; a < y.count; ++a) {
    V read = {}, read_slope = {};
    const T row_weight = y.weights[a] * modulation;
    for (int32_t b = 0; b < x.count; ++b) {
      const int64_t at = int64_t(y.pixels[a] + x.pixels[b]) * map.pixel_stride + channel;
      if constexpr (kScatter) {
        T* to = map.grads + at;
        const V weight = splat(row_weight * x.weights[b]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          store(to + v * kSize, load(to + v * kSize) + weight * g[v]);
        }
      }
      if constexpr (kDots) {
        const T* from = map.features + at;
        V dot = g[0] * load(from);
#pragma GCC unroll 4
        for (int v = 1; v < kVectors; ++v) dot += g[v] * load(from + v * kSize);
        read += dot * x.weights[b];
        read_slope += dot * x.slopes[b];
      }
    }
    if constexpr (kDots) {
      sums[0] += read * y.weights[a];
      sums[1] += read_slope * y.weights[a];
      sums[2] += read * y.slopes[a];
    }
  }
}

// The same for a bin that reads two rows and two columns, as each does that has one point. All is
// read before anything is written: rows of the map are often a multiple of 4096 bytes apart, and a
// load that follows a store at the same place in a page waits for it.
template <int kVectors, bool kDots, bool kScatter, typename T>
inline __attribute__((always_inline)) void scatter_square(const Reads<T>& y, const Reads<T>& x,
                                                          T modulation, const RoiMap<T>& map,
                                                          int64_t channel, const T* grad,
                                                          typename Vec<T>::type* sums) {
  using V = typename Vec<T>::type;
  constexpr int64_t kSize = Vec<T>::kSize;
  int64_t at[4];
  V weight[4], dots[4] = {};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    at[i] = int64_t(y.pixels[i / 2] + x.pixels[i % 2]) * map.pixel_stride + channel;
    weight[i] = splat(y.weights[i / 2] * x.weights[i % 2] * modulation);
  }
#pragma GCC unroll 4
  for (int64_t v = 0; v < kVectors * kSize; v += kSize) {
    const V g = load(grad + v);
    V next[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (kDots) dots[i] += g * load(map.features + at[i] + v);
      if (kScatter) next[i] = load(map.grads + at[i] + v) + weight[i] * g;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (kScatter) store(map.grads + at[i] + v, next[i]);
    }
  }
  if constexpr (kDots) {
    const V low = dots[0] * x.weights[0] + dots[1] * x.weights[1];
    const V high = dots[2] * x.weights[0] + dots[3] * x.weights[1];
    const V low_slope = dots[0] * x.slopes[0] + dots[1] * x.slopes[1];
    const V high_slope = dots[2] * x.slopes[0] + dots[3] * x.slopes[1];
    sums[0] += low * y.weights[0] + high * y.weights[1];
    sums[1] += low_slope * y.weights[0] + high_slope * y.weights[1];
    sums[2] += low * y.slopes[0] + high * y.slopes[1];
  }
}

template <int kVectors, bool kDots, bool kScatter, typename T>
inline __attribute__((always_inline)) void scatter_any(const Reads<T>& y, const Reads<T>& x,
                                                       T modulation, const RoiMap<T>& map,
                                                       int64_t channel, const T* grad,
                                                       typename Vec<T>::type* sums) {
  if (y.count == 2 && x.count == 2) {
    scatter_square<kVectors, kDots, kScatter>(y, x, modulation, map, channel, grad, sums);
  } else {
    scatter_bin<kVectors, kDots, kScatter>(y, x, modulation, map, channel, grad, sums);
  }
}

template <bool kDots, bool kScatter, typename T>
void scatter(const RoiBatch<T>& batch, const RoiMap<T>& map, const RoiTensor& grad_output,
             int64_t first_channel, int64_t channels, T* sums, T* tile) {
  using V = typename Vec<T>::type;
  constexpr int64_t kSize = Vec<T>::kSize;
  const int64_t width = (channels + kSize - 1) / kSize * kSize;
  for (int64_t q = 0; q < batch.count; ++q) {
    Pixels from = grad_output.first;
    from.data = static_cast<char*>(from.data) + batch.members[q] * grad_output.roi_bytes;
    load_rows(from, first_channel, channels, 0, batch.bins(), tile, width);
    for_each_bin(batch, q, [&](int64_t bin, const Reads<T>& y, const Reads<T>& x, T modulation) {
      prefetch_bin<kDots, kScatter>(batch, q, bin + kFetchBins, map, 0, width);
      const T* grad = tile + bin * width;
      V dots[3] = {};
      int64_t c = 0;
      for (; width - c >= 4 * kSize; c += 4 * kSize) {
        scatter_any<4, kDots, kScatter>(y, x, modulation, map, c, grad + c, dots);
      }
      for (; width - c >= 2 * kSize; c += 2 * kSize) {
        scatter_any<2, kDots, kScatter>(y, x, modulation, map, c, grad + c, dots);
      }
      for (; c < width; c += kSize) {
        scatter_any<1, kDots, kScatter>(y, x, modulation, map, c, grad + c, dots);
      }
      if constexpr (kDots) {
        T part[4];
        store_sums<T>(dots[0], dots[1], dots[2], V{}, part);
        T* sum = sums + (q * batch.bins() + bin) * 3;
        sum[0] += part[0], sum[1] += part[2], sum[2] += part[1];
      }
    });
  }
}

template <typename T>
void scatter_rois(const RoiBatch<T>& batch, const RoiMap<T>& map, const RoiTensor& grad_output,
                  int64_t first_channel, int64_t channels, T* sums, T* tile) {
  if (map.features && map.grads) {
    scatter<true, true>(batch, map, grad_output, first_channel, channels, sums, tile);
  } else if (map.features) {
    scatter<true, false>(batch, map, grad_output, first_channel, channels, sums, tile);
  } else {
    scatter<false, true>(batch, map, grad_output, first_channel, channels, sums, tile);
  }
}

#define D2DET_INSTANTIATE(T)                                                                     \
  template void scatter_rois<T>(const RoiBatch<T>&, const RoiMap<T>&, const RoiTensor&, int64_t, \
                                int64_t, T*, T*);
D2DET_INSTANTIATE(float)
D2DET_INSTANTIATE(double)
#undef D2DET_INSTANTIATE

}  // namespace d2det::D2DET_ISA
