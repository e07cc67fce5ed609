// Included by kernels.h, once for each instruction set.
//
// Corners and weights are found once for each bin and serve all its channels, which are the
// vectors' lanes. Bilinear weights are products of one factor for each axis.

#include "deform_roi_pool.h"
#include "simd_rows.h"

namespace d2det::D2DET_ISA {

// Adds a weight to the entry of a pixel, or makes one; neighbouring points share pixels, so the
// last two entries are all that need looking at.
template <typename T>
inline __attribute__((always_inline)) void merge_pixel(int32_t pixel, T weight, T slope,
                                                       int32_t& count, int32_t* pixels, T* weights,
                                                       T* slopes) {
  int32_t at = count;
  if (count > 0 && pixels[count - 1] == pixel) {
    at = count - 1;
  } else if (count > 1 && pixels[count - 2] == pixel) {
    at = count - 2;
  }
  if (at == count) {
    pixels[count++] = pixel;
    weights[at] = T(0);
    if (slopes) slopes[at] = T(0);
  }
  weights[at] += weight;
  if (slopes) slopes[at] += slope;
}

// One entry of the plan. `shift` is null where the grid is regular.
template <typename T>
inline __attribute__((always_inline)) void plan_entry(const RoiBatch<T>& batch, RoiSpan<T> span,
                                                      int32_t bin, const T* shift, int32_t size,
                                                      int32_t step, int32_t* entry, T* weights,
                                                      int32_t* box) {
  const int32_t points = batch.sampling_ratio, bins = batch.output_size;
  T* slopes = batch.with_slopes ? weights + batch.reach() : nullptr;
  const T moved = shift ? product(*shift, batch.gamma) : T(0);
  const auto position = [&](int32_t point) {
    return shift ? roi_position(span, bin, bins, point, points, moved, batch.convention)
                 : roi_position(span, bin, bins, point, points, batch.convention);
  };
  int32_t averaged = points;
  if (batch.convention == RoiConvention::kPsroi) {
    averaged = 0;
    for (int32_t i = 0; i < points; ++i) {
      averaged += roi_reads(position(i), size, batch.convention) ? 1 : 0;
    }
  }
  const T share = T(1) / T(averaged > 1 ? averaged : 1);
  int32_t count = 0;
  for (int32_t i = 0; i < points; ++i) {
    const T at = position(i);
    const T part = roi_reads(at, size, batch.convention) ? share : T(0);
    const Neighbours<T> n = roi_neighbours(at, size);
    merge_pixel(n.low * step, n.weight_low * part, n.slope_low * part, count, entry + 1, weights,
                slopes);
    merge_pixel(n.high * step, n.weight_high * part, n.slope_high * part, count, entry + 1, weights,
                slopes);
    box[0] = n.low < box[0] ? n.low : box[0];
    box[1] = n.high > box[1] ? n.high : box[1];
  }
  entry[0] = count;
}

template <typename T>
void plan_rois(const RoiBatch<T>& batch, int64_t begin, int64_t end) {
  const int32_t o = batch.output_size;
  const int64_t entries = batch.entries();
  for (int64_t q = begin; q < end; ++q) {
    const T* roi = batch.rois + 5 * batch.members[q];
    for (int32_t axis = 0; axis < 2; ++axis) {  // y, then x
      const int32_t size = axis == 0 ? batch.height : batch.width;
      const int32_t step = axis == 0 ? batch.width : 1;
      const RoiSpan<T> span = roi_span(roi[2 - axis], roi[4 - axis], batch.scale, batch.convention);
      const T* shifts = nullptr;  // x comes first
      if (batch.offset) {
        shifts = batch.offset + (batch.members[q] * 2 + 1 - axis) * batch.bins();
      }
      int32_t* entry = batch.pixels + (q * 2 + axis) * entries * batch.pixel_step();
      T* weights = batch.weights + (q * 2 + axis) * entries * batch.weight_step();
      int32_t* box = batch.boxes + 4 * q + 2 * axis;
      box[0] = size - 1;
      box[1] = 0;
      for (int64_t e = 0; e < entries; ++e) {
        const int32_t bin = static_cast<int32_t>(!shifts ? e : axis == 0 ? e / o : e % o);
        plan_entry(batch, span, bin, shifts ? shifts + e : nullptr, size, step, entry, weights,
                   box);
        entry += batch.pixel_step();
        weights += batch.weight_step();
      }
    }
  }
}

template <typename T>
void fill_rows(const Pixels& map, int64_t first_channel, int64_t channels, int64_t first_pixel,
               int64_t pixels, T* rows, int64_t row_stride) {
  load_rows(map, first_channel, channels, first_pixel, pixels, rows, row_stride);
}

template <typename T>
void drain_rows(const T* rows, int64_t row_stride, const Pixels& map, int64_t first_channel,
                int64_t channels, int64_t first_pixel, int64_t pixels) {
  store_rows(rows, row_stride, map, first_channel, channels, first_pixel, pixels);
}

// One axis of one bin.
template <typename T>
struct Reads {
  int32_t count;
  const int32_t* pixels;
  const T* weights;
  const T* slopes;

  inline __attribute__((always_inline)) Reads(const RoiBatch<T>& batch, int64_t q, int32_t axis,
                                              int64_t entry) {
    const int64_t at = (q * 2 + axis) * batch.entries() + entry;
    pixels = batch.pixels + at * batch.pixel_step();
    count = *pixels++;
    weights = batch.weights + at * batch.weight_step();
    slopes = weights + batch.reach();
  }
};

// Calls run(bin, reads of y, reads of x, modulation) for every bin of a RoI.
template <typename T, typename Function>
inline __attribute__((always_inline)) void for_each_bin(const RoiBatch<T>& batch, int64_t q,
                                                        Function run) {
  const int64_t o = batch.output_size;
  const T* modulation =
      batch.modulation ? batch.modulation + batch.members[q] * batch.bins() : nullptr;
  for (int64_t bin = 0; bin < batch.bins(); ++bin) {
    const Reads<T> y(batch, q, 0, batch.offset ? bin : bin / o);
    const Reads<T> x(batch, q, 1, batch.offset ? bin : bin % o);
    run(bin, y, x, modulation ? modulation[bin] : T(1));
  }
}

// Bins between the one that is worked on and the one that is fetched into the cache.
constexpr int64_t kFetchBins = 4;

// Asks for `width` channels of what a bin reads (kFeatures) and adds to (kGrads): where offsets
// lead the processor does not foresee.
template <bool kFeatures, bool kGrads, typename T>
inline __attribute__((always_inline)) void prefetch_bin(const RoiBatch<T>& batch, int64_t q,
                                                        int64_t bin, const RoiMap<T>& map,
                                                        int64_t channel, int64_t width) {
  if (!batch.offset || bin >= batch.bins()) return;
  const Reads<T> y(batch, q, 0, bin), x(batch, q, 1, bin);
  for (int32_t a = 0; a < y.count; ++a) {
    for (int32_t b = 0; b < x.count; ++b) {
      const int64_t at = int64_t(y.pixels[a] + x.pixels[b]) * map.pixel_stride + channel;
      for (int64_t c = at; c < at + width; c += 64 / sizeof(T)) {
        if (kFeatures) __builtin_prefetch(map.features + c);
        if (kGrads) __builtin_prefetch(map.grads + c, 1);
      }
    }
  }
}

// kVectors vectors of channels of one bin.
template <int kVectors, typename T>
inline __attribute__((always_inline)) void pool_bin(const Reads<T>& y, const Reads<T>& x,
                                                    T modulation, const T* features,
                                                    int64_t pixel_stride, T* to) {
  using V = typename Vec<T>::type;
  constexpr int64_t kSize = Vec<T>::kSize;
  V sum[kVectors] = {};
  for (int32_t a = 0; a < y.count; ++a) {
    for (int32_t b = 0; b < x.count; ++b) {
      const T* pixel = features + int64_t(y.pixels[a] + x.pixels[b]) * pixel_stride;
      const V weight = splat(y.weights[a] * x.weights[b]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[v] += weight * load(pixel + v * kSize);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store(to + v * kSize, sum[v] * modulation);
}

template <typename T>
void pool_rois(const RoiBatch<T>& batch, const RoiMap<T>& map, const RoiTensor& output,
               int64_t first_channel, int64_t channels, int64_t begin, int64_t end, T* tile) {
  constexpr int64_t kSize = Vec<T>::kSize;
  const int64_t padded = (channels + kSize - 1) / kSize * kSize;
  for (int64_t q = begin; q < end; ++q) {
    Pixels to = output.first;
    to.data = static_cast<char*>(to.data) + batch.members[q] * output.roi_bytes;
    for (int64_t c = 0; c < channels;) {
      const T* features = map.features + c;
      const int64_t width = padded - c >= 4 * kSize ? 4 * kSize : kSize;
      for_each_bin(batch, q, [&](int64_t bin, const Reads<T>& y, const Reads<T>& x, T modulation) {
        prefetch_bin<true, false>(batch, q, bin + kFetchBins, map, c, width);
        T* row = tile + bin * width;
        if (width == kSize) {
          pool_bin<1>(y, x, modulation, features, map.pixel_stride, row);
        } else {
          pool_bin<4>(y, x, modulation, features, map.pixel_stride, row);
        }
      });
      const int64_t some = channels - c < width ? channels - c : width;
      store_rows(tile, width, to, first_channel + c, some, 0, batch.bins());
      c += width;
    }
  }
}

#define D2DET_INSTANTIATE(T)                                                                  \
  template void plan_rois<T>(const RoiBatch<T>&, int64_t, int64_t);                           \
  template void fill_rows<T>(const Pixels&, int64_t, int64_t, int64_t, int64_t, T*, int64_t); \
  template void drain_rows<T>(const T*, int64_t, const Pixels&, int64_t, int64_t, int64_t,    \
                              int64_t);                                                       \
  template void pool_rois<T>(const RoiBatch<T>&, const RoiMap<T>&, const RoiTensor&, int64_t, \
                             int64_t, int64_t, int64_t, T*);
D2DET_INSTANTIATE(float)
D2DET_INSTANTIATE(double)
#undef D2DET_INSTANTIATE

}  // namespace d2det::D2DET_ISA
