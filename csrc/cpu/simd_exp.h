// The exponential function and the sigmoid of vectors; included behind the target pragma.

#pragma once

#include "simd_convert.h"

namespace d2det::D2DET_ISA {

// Within 2 units in the last place; infinite above 88.73, 0 below -104, NaN for NaN.
inline __attribute__((always_inline)) Floats exponential(Floats x) {
  x = x < -104.0f ? splat(-104.0f) : x;
  x = x > 89.0f ? splat(89.0f) : x;
  // x = n log(2) + r: adding 1.5 * 2^23 leaves n in the lowest bits, rounded to the nearest.
  constexpr float kShift = 12582912.0f;
  const Floats shifted = x * 1.44269504f + kShift;
  const Floats n = shifted - kShift;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // Cephes' polynomial for exp(r).
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors, since n reaches beyond the exponents of normal numbers.
  using Integers = Vec<int32_t>::type;
  const Integers power = (Integers)shifted - (Integers)splat(kShift);
  const Integers first = power >> 1, second = power - first;
  return p * (Floats)((first + 127) << 23) * (Floats)((second + 127) << 23);
}

inline __attribute__((always_inline)) Vec<double>::type exponential(Vec<double>::type x) {
  for (int64_t i = 0; i < Vec<double>::kSize; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

template <typename V>
inline __attribute__((always_inline)) V sigmoid(V x) {
  return 1 / (1 + exponential(-x));
}

}  // namespace d2det::D2DET_ISA
