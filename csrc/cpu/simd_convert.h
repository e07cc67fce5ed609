// Vectors of float from memory in half precision, and back; included behind the target pragma.

#pragma once

#include "element.h"

namespace d2det::D2DET_ISA {

// As many numbers of another type as a vector of float holds.
template <typename T>
struct Beside {
  typedef T type __attribute__((vector_size(Vec<float>::kSize * sizeof(T))));
  typedef T stored
      __attribute__((vector_size(Vec<float>::kSize * sizeof(T)), aligned(alignof(T)), may_alias));
};

using Floats = Vec<float>::type;
using Words = Vec<uint32_t>::type;
using Shorts = Beside<uint16_t>::type;

inline __attribute__((always_inline)) Words widen(const void* from) {
  const Shorts bits = *static_cast<const Beside<uint16_t>::stored*>(from);
  return __builtin_convertvector(bits, Words);
}

inline __attribute__((always_inline)) void narrow(void* to, Words bits) {
  *static_cast<Beside<uint16_t>::stored*>(to) = __builtin_convertvector(bits, Shorts);
}

inline __attribute__((always_inline)) Floats load_as(const float* from, float) {
  return load(from);
}
inline __attribute__((always_inline)) Vec<double>::type load_as(const double* from, double) {
  return load(from);
}
inline __attribute__((always_inline)) Floats load_as(const BFloat16Bits* from, float) {
  return (Floats)(widen(from) << 16);
}
inline __attribute__((always_inline)) void store_as(float* to, Floats value) { store(to, value); }
inline __attribute__((always_inline)) void store_as(double* to, Vec<double>::type value) {
  store(to, value);
}
// To the nearest, halves to even; NaN stays NaN.
inline __attribute__((always_inline)) void store_as(BFloat16Bits* to, Floats value) {
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (bits >> 16) | 0x40u;
  narrow(to, (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
#if D2DET_VECTOR_BYTES == 64
inline __attribute__((always_inline)) Floats load_as(const Float16Bits* from, float) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline __attribute__((always_inline)) void store_as(Float16Bits* to, Floats value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif D2DET_VECTOR_BYTES == 32
inline __attribute__((always_inline)) Floats load_as(const Float16Bits* from, float) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline __attribute__((always_inline)) void store_as(Float16Bits* to, Floats value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, 0));
}
#else
inline __attribute__((always_inline)) Floats load_as(const Float16Bits* from, float) {
  const Words bits = widen(from);
  const Words magnitude = (bits & 0x7fffu) << 13;
  const Words normal = magnitude + (112u << 23);
  const Words special = magnitude + (224u << 23);  // infinity and NaN
  // A subnormal is that many units of 2^-24: as the fraction of a number of 2^-14, less 2^-14.
  const Words subnormal = (Words)((Floats)(magnitude + (113u << 23)) - 0x1p-14f);
  Words result = magnitude >= (31u << 23) ? special : normal;
  result = magnitude < (1u << 23) ? subnormal : result;
  return (Floats)(result | ((bits & 0x8000u) << 16));
}

inline __attribute__((always_inline)) void store_as(Float16Bits* to, Floats value) {
  const Words bits = (Words)value;
  const Words magnitude = bits & 0x7fffffffu;
  const Words normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Added to 0.5, a number below 2^-14 has its last place at 2^-24, which rounds it.
  const Words subnormal = (Words)((Floats)magnitude + 0.5f) - (126u << 23);
  const Words none = magnitude - magnitude;
  Words result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= (143u << 23) ? none + 0x7c00u : result;
  result = magnitude > 0x7f800000u ? none + 0x7e00u : result;
  narrow(to, result | ((bits >> 16) & 0x8000u));
}
#endif

inline __attribute__((always_inline)) float load_one(const float* from, float) { return *from; }
inline __attribute__((always_inline)) double load_one(const double* from, double) { return *from; }
inline __attribute__((always_inline)) float load_one(const BFloat16Bits* from, float) {
  const uint32_t bits = static_cast<uint32_t>(from->bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

// The first `count` numbers, fewer than a vector; the rest is 0.
template <typename T, typename S>
inline __attribute__((always_inline)) typename Vec<T>::type load_some(const S* from,
                                                                      int64_t count) {
  S buffer[Vec<T>::kSize] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
  return load_as(buffer, T());
}

template <typename T, typename S>
inline __attribute__((always_inline)) void store_some(S* to, typename Vec<T>::type value,
                                                      int64_t count) {
  S buffer[Vec<T>::kSize];
  store_as(buffer, value);
  for (int64_t i = 0; i < count; ++i) to[i] = buffer[i];
}

}  // namespace d2det::D2DET_ISA
