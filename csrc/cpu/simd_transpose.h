// Squares of numbers transposed in registers, and sums over lanes; included behind the target
// pragma.

#pragma once

namespace d2det::D2DET_ISA {

template <int... I>
struct Lanes {};
template <int N, int... I>
struct FirstLanes : FirstLanes<N - 1, N - 1, I...> {};
template <int... I>
struct FirstLanes<0, I...> {
  using type = Lanes<I...>;
};

// a0 b0 a1 b1 ... of the lower (kUpper = 0) or the upper halves (1) of two vectors.
template <int kUpper, typename V, int... I>
inline __attribute__((always_inline)) V interleave(V a, V b, Lanes<I...>) {
  constexpr int kSize = sizeof...(I);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (I % 2 * kSize + kUpper * kSize / 2 + I / 2)...);
#else
  using Mask = decltype(a < b);
  return __builtin_shuffle(a, b, Mask{(I % 2 * kSize + kUpper * kSize / 2 + I / 2)...});
#endif
}

// Lanes of a and b in turn, of their lower or upper halves.
template <typename V>
inline __attribute__((always_inline)) V interleave_low(V a, V b) {
  return interleave<0>(a, b, typename FirstLanes<sizeof(V) / sizeof(a[0])>::type{});
}
template <typename V>
inline __attribute__((always_inline)) V interleave_high(V a, V b) {
  return interleave<1>(a, b, typename FirstLanes<sizeof(V) / sizeof(a[0])>::type{});
}

// In place: lane j of vector i becomes lane i of vector j.
template <typename T>
inline __attribute__((always_inline)) void transpose(typename Vec<T>::type* rows) {
  constexpr int64_t kSize = Vec<T>::kSize;
  typename Vec<T>::type next[kSize];
#pragma GCC unroll 8
  for (int64_t step = 1; step < kSize; step *= 2) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kSize / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + kSize / 2]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + kSize / 2]);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kSize; ++i) rows[i] = next[i];
  }
}

// Sums of the lanes of four vectors, stored in the order 0, 2, 1, 3.
template <typename T>
inline __attribute__((always_inline)) void store_sums(typename Vec<T>::type a,
                                                      typename Vec<T>::type b,
                                                      typename Vec<T>::type c,
                                                      typename Vec<T>::type d, T* to) {
  using V = typename Vec<T>::type;
  constexpr int64_t lanes = Vec<T>::kSize;
  const V ab = interleave_low(a, b) + interleave_high(a, b);
  const V cd = interleave_low(c, d) + interleave_high(c, d);
  if constexpr (lanes == 2) {
    to[0] = ab[0], to[1] = cd[0], to[2] = ab[1], to[3] = cd[1];
  } else {
    typedef T Four __attribute__((vector_size(4 * sizeof(T)), aligned(alignof(T)), may_alias));
    T parts[lanes];
    store(parts, interleave_low(ab, cd) + interleave_high(ab, cd));
    Four sum = *reinterpret_cast<const Four*>(parts);
    for (int64_t i = 4; i < lanes; i += 4) sum += *reinterpret_cast<const Four*>(parts + i);
    *reinterpret_cast<Four*>(to) = sum;
  }
}

}  // namespace d2det::D2DET_ISA
