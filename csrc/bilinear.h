// The mathematics of sampling, shared by the CPU and the CUDA kernels so that they cannot drift
// apart. One axis at a time: a bilinear weight is the product of one factor for each axis.
// T is float or double.

#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define D2DET_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define D2DET_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace d2det {

// The two pixels that a position lies between. Indices are always within the map; a pixel outside
// of it has the weight and slope 0 at the index it was clamped to. A NaN position has NaN weights.
template <typename T>
struct Neighbours {
  int32_t low, high;
  T weight_low, weight_high;
  T slope_low, slope_high;  // derivatives of the weights with respect to the position
};

D2DET_HOST_DEVICE float floor_of(float value) { return ::floorf(value); }
D2DET_HOST_DEVICE double floor_of(double value) { return ::floor(value); }

// A product rounded on its own. Fused into a sum it would move positions by an ulp off those of the
// reference, which at a margin decides whether a point is read.
template <typename T>
D2DET_HOST_DEVICE T product(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(double)) {
    return __dmul_rn(a, b);
  } else {
    return __fmul_rn(a, b);
  }
#else
  T result = a * b;
#if defined(__x86_64__)
  asm("" : "+x"(result));  // hides the product from the compiler
#elif defined(__aarch64__)
  asm("" : "+w"(result));
#endif
  return result;
#endif
}

// Deformable convolution (DCNv2, Eq. 1): zero outside of the map. At whole numbers the slope is the
// one towards the higher pixel.
template <typename T>
D2DET_HOST_DEVICE Neighbours<T> conv_neighbours(T position, int32_t size) {
  // Positions beyond the map's border by two pixels or more read nothing: the limit keeps the
  // conversion to an integer defined. NaN passes both comparisons.
  T limited = position < T(-2) ? T(-2) : position;
  limited = limited > T(size + 1) ? T(size + 1) : limited;
  const T floor = floor_of(limited);
  const T fraction = limited - floor;
  const int32_t low = limited == limited ? static_cast<int32_t>(floor) : 0;
  const int32_t high = low + 1;
  const bool low_inside = low >= 0 && low < size;
  const bool high_inside = high >= 0 && high < size;
  Neighbours<T> result;
  result.low = low_inside ? low : (low < 0 ? 0 : size - 1);
  result.high = high_inside ? high : (high < 0 ? 0 : size - 1);
  result.weight_low = low_inside ? T(1) - fraction : T(0);
  result.weight_high = high_inside ? fraction : T(0);
  result.slope_low = low_inside ? T(-1) : T(0);
  result.slope_high = high_inside ? T(1) : T(0);
  return result;
}

// RoI pooling's two conventions (d2det/ops/deform_roi_pool.py describes them).
enum class RoiConvention : int32_t { kAligned = 0, kPsroi = 1 };

// A RoI along one axis, in pixels of its level.
template <typename T>
struct RoiSpan {
  T start, extent;
};

template <typename T>
D2DET_HOST_DEVICE T round_half_away(T value) {
  return value < T(0) ? -floor_of(-value + T(0.5)) : floor_of(value + T(0.5));
}

// From the RoI's corners in image pixels; `scale` is 1 / stride.
template <typename T>
D2DET_HOST_DEVICE RoiSpan<T> roi_span(T low, T high, T scale, RoiConvention convention) {
  if (convention == RoiConvention::kAligned) {
    return {product(low, scale) - T(0.5), (high - low) * scale};
  }
  const T start = product(round_half_away(low), scale) - T(0.5);
  const T end = product(round_half_away(high) + T(1), scale) - T(0.5);
  const T extent = end - start;
  return {start, extent < T(0.1) ? T(0.1) : extent};
}

// Where sample `point` of `points` in bin `bin` of `bins` of a regular grid lies.
template <typename T>
D2DET_HOST_DEVICE T roi_position(RoiSpan<T> span, int32_t bin, int32_t bins, int32_t point,
                                 int32_t points, RoiConvention convention) {
  const T step = T(bin * points + point) + (convention == RoiConvention::kAligned ? T(0.5) : T(0));
  return span.start + product(step / T(bins * points), span.extent);
}

// The same in a bin that is moved by `shift`: gamma times the offset, a fraction of the RoI.
template <typename T>
D2DET_HOST_DEVICE T roi_position(RoiSpan<T> span, int32_t bin, int32_t bins, int32_t point,
                                 int32_t points, T shift, RoiConvention convention) {
  return roi_position(span, bin, bins, point, points, convention) + product(shift, span.extent);
}

// Whether a position counts at all: "aligned" reads up to one pixel beyond the border, "psroi" up
// to half a pixel. NaN counts, so that it is seen in the result.
template <typename T>
D2DET_HOST_DEVICE bool roi_reads(T position, int32_t size, RoiConvention convention) {
  const T margin = convention == RoiConvention::kAligned ? T(1) : T(0.5);
  return !(position < -margin || position > T(size - 1) + margin);
}

// Neighbours of a position that counts, clamped to the map; the slope is 0 where it was clamped.
// The weights sum to 1: multiply with a point's share of the mean.
template <typename T>
D2DET_HOST_DEVICE Neighbours<T> roi_neighbours(T position, int32_t size) {
  const bool clamped = position < T(0) || position > T(size - 1);
  T limited = position < T(0) ? T(0) : position;
  limited = limited > T(size - 1) ? T(size - 1) : limited;
  const T floor = floor_of(limited);
  const T fraction = limited - floor;
  Neighbours<T> result;
  result.low = limited == limited ? static_cast<int32_t>(floor) : 0;
  result.high = result.low + 1 < size ? result.low + 1 : size - 1;
  result.weight_low = T(1) - fraction;
  result.weight_high = fraction;
  result.slope_low = clamped ? T(0) : T(-1);
  result.slope_high = clamped ? T(0) : T(1);
  return result;
}

}  // namespace d2det
