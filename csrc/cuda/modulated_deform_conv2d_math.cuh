// Arithmetic of the deformable convolution's matrix products, as policies: tensor cores for half
// precision and TF32, multiply-adds of a thread's own for exact float and double.
//
// Tiles whose rows run along the summed dimension ("deep" tiles) have rows of 128 bytes, in units
// of 16, and unit u of row r lies at u ^ (r % 8): neither ldmatrix nor the stores of the gather
// then meet a bank conflict. All policies keep the accumulators where mma.sync keeps them.

#pragma once

#include "modulated_deform_conv2d_problem.cuh"
#include "tensor_core.cuh"

namespace d2det {

constexpr int kUnitBytes = 16, kRowUnits = 8, kRowBytes = kUnitBytes * kRowUnits;

__device__ __forceinline__ int unit_offset(int row, int unit) {
  return row * kRowBytes + ((unit ^ (row & 7)) * kUnitBytes);
}

template <typename ColumnType, typename SumType>
struct MathTypes {
  using Column = ColumnType;  // what tiles hold, and the rows of feature maps in global memory
  using Sum = SumType;
  static constexpr int kUnit = kUnitBytes / sizeof(Column);  // values
  static constexpr int kChunk = kUnit * kRowUnits;
};

// Element: Half, BFloat16 or Tf32.
template <typename Element>
struct TensorMath
    : MathTypes<std::conditional_t<std::is_same_v<Element, Tf32>, float, Element>, float> {
  static constexpr bool kTf32 = std::is_same_v<Element, Tf32>;
  static constexpr int kDepth = kTf32 ? 8 : 16;  // of one mma.sync: 32 bytes
  // Bytes that shift the rows of a tile of multiply_flat against each other, against bank
  // conflicts.
  static constexpr int kFlatPadding = kTf32 ? 32 : 16;
  using typename MathTypes<std::conditional_t<kTf32, float, Element>, float>::Column;

  static __device__ __forceinline__ Column round(float value) {
    if constexpr (kTf32) {
      return round_to_tf32(value);
    } else {
      return Column(value);
    }
  }

  // What asynchronous copies brought may be unrounded.
  static __device__ __forceinline__ uint32_t rounded_word(uint32_t word) {
    if constexpr (kTf32) {
      return __float_as_uint(round_to_tf32(__uint_as_float(word)));
    } else {
      return word;
    }
  }

  // sum[m][n] += A rows (a_row + 16 m ..) times B rows (b_row + 8 n ..), over units `unit` and the
  // next. Both tiles are deep.
  template <bool kRoundA, int kM, int kN>
  static __device__ __forceinline__ void multiply(float (&sum)[kM][kN][4],
                                                  const unsigned char* a_tile, int a_row,
                                                  const unsigned char* b_tile, int b_row,
                                                  int unit) {
    static_assert(kN % 2 == 0);
    const int lane = threadIdx.x % 32;
    // All of B is held, and A comes in one block of rows after the other: fewer registers.
    uint32_t b[kN / 2][4];
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
      const int row = b_row + 16 * n + lane % 8 + lane / 16 * 8;
      load_matrices(b[n], b_tile + unit_offset(row, unit + lane / 8 % 2));
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      FragmentA a;
      const int row = a_row + 16 * m + lane % 16;
      load_matrices(a.word, a_tile + unit_offset(row, unit + lane / 16));
      if constexpr (kRoundA) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a.word[i] = rounded_word(a.word[i]);
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const FragmentB column{{b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]}};
        matrix_multiply(sum[m][n], a, column, Element());
      }
    }
  }

  // The same of "flat" tiles, whose rows run along the result: sum[m][n] += A columns
  // (a_column + 16 m ..) times B columns (b_column + 8 n ..), over rows k to k + kDepth.
  template <int kM, int kN>
  static __device__ __forceinline__ void multiply_flat(float (&sum)[kM][kN][4],
                                                       const unsigned char* a_tile, int a_pitch,
                                                       int a_column, const unsigned char* b_tile,
                                                       int b_pitch, int b_column, int k) {
    static_assert(kN % 2 == 0);
    const int lane = threadIdx.x % 32;
    FragmentB b[kN];
    FragmentA a;
    if constexpr (kTf32) {
      const int row = k + lane % 4, column = lane / 4;
      const auto word = [&](const unsigned char* tile, int pitch, int r, int c) {
        return *reinterpret_cast<const uint32_t*>(tile + r * pitch + c * 4);
      };
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int c = b_column + 8 * n + column;
        b[n] = {{word(b_tile, b_pitch, row, c), word(b_tile, b_pitch, row + 4, c)}};
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int c = a_column + 16 * m + column + i % 2 * 8;
          a.word[i] = rounded_word(word(a_tile, a_pitch, row + i / 2 * 4, c));
        }
#pragma unroll
        for (int n = 0; n < kN; ++n) matrix_multiply(sum[m][n], a, b[n], Element());
      }
    } else {
      const int row = lane % 8, matrix = lane / 8;
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t words[4];
        load_matrices_transposed(words, b_tile + (k + matrix % 2 * 8 + row) * b_pitch +
                                            (b_column + 8 * n + matrix / 2 * 8) * 2);
        b[n] = {{words[0], words[1]}};
        b[n + 1] = {{words[2], words[3]}};
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        load_matrices_transposed(a.word, a_tile + (k + matrix / 2 * 8 + row) * a_pitch +
                                             (a_column + 16 * m + matrix % 2 * 8) * 2);
#pragma unroll
        for (int n = 0; n < kN; ++n) matrix_multiply(sum[m][n], a, b[n], Element());
      }
    }
  }
};

// T: float or double.
template <typename T>
struct ExactMath : MathTypes<T, T> {
  static constexpr int kUnit = MathTypes<T, T>::kUnit;
  static constexpr int kDepth = 2 * kUnit;
  static constexpr int kFlatPadding = 16;

  static __device__ __forceinline__ T round(T value) { return value; }

  template <bool kRoundA, int kM, int kN>
  static __device__ __forceinline__ void multiply(T (&sum)[kM][kN][4], const unsigned char* a_tile,
                                                  int a_row, const unsigned char* b_tile, int b_row,
                                                  int unit) {
    const int group = threadIdx.x % 32 / 4, place = threadIdx.x % 4;
#pragma unroll
    for (int u = unit; u < unit + 2; ++u) {
      Vector<T, kUnit> a[2 * kM];
#pragma unroll
      for (int m = 0; m < 2 * kM; ++m) {
        const int row = a_row + 8 * m + group;
        a[m] = load_vector<kUnit>(reinterpret_cast<const T*>(a_tile + unit_offset(row, u)));
      }
#pragma unroll
      for (int n = 0; n < 2 * kN; ++n) {
        const int row = b_row + n / 2 * 8 + 2 * place + n % 2;
        const auto b = load_vector<kUnit>(reinterpret_cast<const T*>(b_tile + unit_offset(row, u)));
#pragma unroll
        for (int m = 0; m < 2 * kM; ++m) {
#pragma unroll
          for (int i = 0; i < kUnit; ++i) {
            sum[m / 2][n / 2][m % 2 * 2 + n % 2] += a[m].data[i] * b.data[i];
          }
        }
      }
    }
  }

  template <int kM, int kN>
  static __device__ __forceinline__ void multiply_flat(T (&sum)[kM][kN][4],
                                                       const unsigned char* a_tile, int a_pitch,
                                                       int a_column, const unsigned char* b_tile,
                                                       int b_pitch, int b_column, int k) {
    const int group = threadIdx.x % 32 / 4, place = threadIdx.x % 4;
    for (int row = k; row < k + kDepth; ++row) {
      const T* const a_values = reinterpret_cast<const T*>(a_tile + row * a_pitch);
      const T* const b_values = reinterpret_cast<const T*>(b_tile + row * b_pitch);
      T a[2 * kM];
#pragma unroll
      for (int m = 0; m < 2 * kM; ++m) a[m] = a_values[a_column + 8 * m + group];
#pragma unroll
      for (int n = 0; n < 2 * kN; ++n) {
        const T b = b_values[b_column + n / 2 * 8 + 2 * place + n % 2];
#pragma unroll
        for (int m = 0; m < 2 * kM; ++m) sum[m / 2][n / 2][m % 2 * 2 + n % 2] += a[m] * b;
      }
    }
  }
};

// A unit of a tile or a row as numbers to calculate with.
template <int kUnit, typename Column>
__device__ __forceinline__ void widen(const Vector<Column, kUnit>& from,
                                      Accumulate<Column> (&to)[kUnit]) {
  if constexpr (sizeof(Column) == 2) {
    uint4 words;
    memcpy(&words, &from, sizeof(words));
    unpack_pair(words.x, to[0], to[1], Column());
    unpack_pair(words.y, to[2], to[3], Column());
    unpack_pair(words.z, to[4], to[5], Column());
    unpack_pair(words.w, to[6], to[7], Column());
  } else {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) to[e] = from.data[e];
  }
}

// One unit of channels at the four corners, on its way from global memory to a tile.
template <typename Math>
struct Samples {
  using Column = typename Math::Column;
  using Sum = typename Math::Sum;
  static constexpr int kUnit = Math::kUnit;
  Vector<Column, kUnit> corner[4];

  // `base`: the channels of the first pixel of the tile's first image.
  __device__ __forceinline__ void load(const Column* base, const Corners<Sum>& corners,
                                       int32_t channels) {
    const int4 rows = *reinterpret_cast<const int4*>(corners.row);
    corner[0] = load_constant<kUnit>(base + static_cast<int64_t>(rows.x) * channels);
    corner[1] = load_constant<kUnit>(base + static_cast<int64_t>(rows.y) * channels);
    corner[2] = load_constant<kUnit>(base + static_cast<int64_t>(rows.z) * channels);
    corner[3] = load_constant<kUnit>(base + static_cast<int64_t>(rows.w) * channels);
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) corner[i] = Vector<Column, kUnit>{};
  }

  // The weighted sum, rounded, to 16 bytes of a tile.
  __device__ __forceinline__ void store(const Corners<Sum>& corners, unsigned char* to) const {
    Sum total[kUnit];
#pragma unroll
    for (int e = 0; e < kUnit; ++e) total[e] = Sum(0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Sum value[kUnit];
      widen<kUnit>(corner[i], value);
      const Sum weight = corners.weight[i];
#pragma unroll
      for (int e = 0; e < kUnit; ++e) total[e] += weight * value[e];
    }
    if constexpr (sizeof(Column) == 2) {
      *reinterpret_cast<uint4*>(to) = make_uint4(
          pack_pair(total[0], total[1], Column()), pack_pair(total[2], total[3], Column()),
          pack_pair(total[4], total[5], Column()), pack_pair(total[6], total[7], Column()));
    } else {
      Vector<Column, kUnit> rounded;
#pragma unroll
      for (int e = 0; e < kUnit; ++e) rounded.data[e] = Math::round(total[e]);
      store_vector<kUnit>(reinterpret_cast<Column*>(to), rounded);
    }
  }
};

}  // namespace d2det
