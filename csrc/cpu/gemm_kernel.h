// The inner kernel of a packed matrix product: a tile of C held in registers, in which rows of A
// are broadcast and rows of B are vectors. A and B are read with strides known to the compiler, so
// that each address is a base and a constant.

namespace d2det::D2DET_ISA {

// How elements are multiplied and summed: T in, T out.
template <typename T>
struct Dot {
  using Element = T;
  using Sum = T;
  using Vector = typename Vec<T>::type;
  static constexpr int64_t kDepth = 1;  // products in one step

  static inline __attribute__((always_inline)) Vector broadcast(const T* from) {
    return splat(*from);
  }
  static inline __attribute__((always_inline)) Vector row(const T* from) { return load(from); }
  static inline __attribute__((always_inline)) Vector add(Vector sum, Vector a, Vector b) {
    return multiply_add(a, b, sum);
  }
};

// Two neighbours in the reduced dimension, as bfloat16, the first in the lower half.
struct Bf16Pair {
  uint32_t bits;
};

// What T is multiplied as, and what the input's rows are kept in.
template <typename T, bool kDot>
struct Factor {
  using type = T;
  using Row = T;
};
template <>
struct Factor<float, true> {
  using type = Bf16Pair;
  using Row = BFloat16Bits;
};

#if D2DET_BF16_DOT
// Pairs of bfloat16, summed in float32.
template <>
struct Dot<Bf16Pair> {
  using Element = Bf16Pair;
  using Sum = float;
  using Vector = Vec<float>::type;
  static constexpr int64_t kDepth = 2;

  static inline __attribute__((always_inline)) __m512i broadcast(const Bf16Pair* from) {
    return _mm512_set1_epi32(static_cast<int>(from->bits));
  }
  static inline __attribute__((always_inline)) __m512i row(const Bf16Pair* from) {
    return _mm512_loadu_si512(from);
  }
  static inline __attribute__((always_inline)) Vector add(Vector sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

#if D2DET_BF16_DOT
// In place: rows 2i and 2i + 1, rounded, become the row i of pairs. `count` rows, an even number,
// of `width` numbers.
inline void pair_rows(float* rows, int64_t count, int64_t width) {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 16; ++i) order[2 * i] = i, order[2 * i + 1] = 16 + i;
  const __m512i interleaved = _mm512_load_si512(order);
  for (int64_t i = 0; i < count / 2; ++i) {
    const float* from = rows + 2 * i * width;
    for (int64_t v = 0; v < width; v += 16) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(load(from + width + v), load(from + v));
      _mm512_storeu_si512(rows + i * width + v, _mm512_permutexvar_epi16(interleaved, both));
    }
  }
}

// Neighbours in a row become pairs; `count` numbers, a multiple of 32.
inline void pair_neighbours(const float* from, int64_t count, Bf16Pair* to) {
  for (int64_t i = 0; i < count; i += 32) {
    _mm512_storeu_si512(to + i / 2,
                        (__m512i)_mm512_cvtne2ps_pbh(load(from + i + 16), load(from + i)));
  }
}
#else
inline void pair_rows(float*, int64_t, int64_t) {}
inline void pair_neighbours(const float*, int64_t, Bf16Pair*) {}
#endif

// C is (MR, NV vectors); a step of the sum reads A[r * SA + i * KA] and the i-th row of B.
template <typename E, int MR, int NV, int SA, int KA>
struct ProductTile {
  using D = Dot<E>;
  using S = typename D::Sum;
  static constexpr int kLanes = Vec<S>::kSize;
  static constexpr int kWidth = NV * kLanes;

  typename D::Vector sum[MR][NV];

  inline __attribute__((always_inline)) void clear() {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sum[r][v] = typename D::Vector{};
    }
  }

  inline __attribute__((always_inline)) void read(const S* c) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sum[r][v] = load(c + r * kWidth + v * kLanes);
    }
  }

  inline __attribute__((always_inline)) void write(S* c) const {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) store(c + r * kWidth + v * kLanes, sum[r][v]);
    }
  }

  inline __attribute__((always_inline)) void step(const E* a, const E* b) {
    decltype(D::row(b)) row[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) row[v] = D::row(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const auto value = D::broadcast(a + r * SA);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sum[r][v] = D::add(sum[r][v], value, row[v]);
    }
  }

  inline __attribute__((always_inline)) void add(const E* a, const E* b, int64_t steps) {
#pragma GCC unroll 2
    for (int64_t i = 0; i < steps; ++i) {
      __builtin_prefetch(b + i * kWidth + 8 * kWidth);
      if (NV > 1) __builtin_prefetch(b + i * kWidth + 8 * kWidth + kLanes);
      step(a + i * KA, b + i * kWidth);
    }
  }
};

// Rows of C for products whose A has as many rows as there are pixels.
constexpr int kPixelRows = D2DET_VECTOR_BYTES == 64 ? 14 : D2DET_VECTOR_BYTES == 32 ? 6 : 4;

}  // namespace d2det::D2DET_ISA
