// Change of layout and of dtype: numbers are read and written as they are stored, and transposed
// in registers.

namespace d2det::D2DET_ISA {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

typedef uint16_t HalfBits __attribute__((vector_size(D2DET_VECTOR_BYTES / 2)));
typedef uint16_t StoredHalfBits
    __attribute__((vector_size(D2DET_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t WordBits __attribute__((vector_size(D2DET_VECTOR_BYTES)));

inline __attribute__((always_inline)) Vec<float>::type load_as(const float* from) {
  return load(from);
}
inline __attribute__((always_inline)) Vec<double>::type load_as(const double* from) {
  return load(from);
}
inline __attribute__((always_inline)) Vec<float>::type load_as(const BFloat16* from) {
  const HalfBits half = *reinterpret_cast<const StoredHalfBits*>(from);
  return (Vec<float>::type)(__builtin_convertvector(half, WordBits) << 16);
}
inline __attribute__((always_inline)) void store_as(float* to, Vec<float>::type value) {
  store(to, value);
}
inline __attribute__((always_inline)) void store_as(double* to, Vec<double>::type value) {
  store(to, value);
}

// Rounded to the nearest, ties to even, in the upper half of each word.
inline __attribute__((always_inline)) WordBits rounded_to_bf16(Vec<float>::type value) {
  const WordBits bits = (WordBits)value;
  const WordBits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const WordBits is_nan = (WordBits)(value != value);
  return (rounded & ~is_nan) | ((bits | 0x400000u) & is_nan);
}
inline __attribute__((always_inline)) void store_as(BFloat16* to, Vec<float>::type value) {
  *reinterpret_cast<StoredHalfBits*>(to) =
      __builtin_convertvector(rounded_to_bf16(value) >> 16, HalfBits);
}

#if D2DET_VECTOR_BYTES == 64
inline __attribute__((always_inline)) Vec<float>::type load_as(const Float16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline __attribute__((always_inline)) void store_as(Float16* to, Vec<float>::type value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif D2DET_VECTOR_BYTES == 32
inline __attribute__((always_inline)) Vec<float>::type load_as(const Float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline __attribute__((always_inline)) void store_as(Float16* to, Vec<float>::type value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, 0));
}
#else
inline float from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  uint32_t bits = magnitude << 13;
  float result;
  if (magnitude >= 0x7c00) {
    bits |= 0x7f800000;  // infinity and NaN
  } else if (magnitude >= 0x400) {
    bits += (127 - 15) << 23;
  } else {  // subnormal: a multiple of 2^-24
    result = static_cast<float>(magnitude) * 0x1p-24f;
    memcpy(&bits, &result, sizeof(bits));
  }
  bits |= sign;
  memcpy(&result, &bits, sizeof(bits));
  return result;
}
inline uint16_t to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (bits < 0x38800000) {                       // subnormal: adding 0.5 rounds at 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, sizeof(bits));
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, sizeof(bits));
    return sign | (bits - 0x3f000000);
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return sign | ((bits - ((127 - 15) << 23)) >> 13);
}
inline Vec<float>::type load_as(const Float16* from) {
  Vec<float>::type result;
  for (int64_t i = 0; i < Vec<float>::kSize; ++i) result[i] = from_half(from[i].bits);
  return result;
}
inline void store_as(Float16* to, Vec<float>::type value) {
  for (int64_t i = 0; i < Vec<float>::kSize; ++i) to[i].bits = to_half(value[i]);
}
#endif

// The first `count` elements only; the others are zero, or not written.
template <typename T, typename S>
inline typename Vec<T>::type load_some(const S* from, int64_t count) {
  S buffer[Vec<T>::kSize] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
  return load_as(buffer);
}
template <typename T, typename S>
inline void store_some(S* to, typename Vec<T>::type value, int64_t count) {
  S buffer[Vec<T>::kSize];
  store_as(buffer, value);
  for (int64_t i = 0; i < count; ++i) to[i] = buffer[i];
}

// Lanes of a and b in turn, of their lower or upper halves.
template <typename V>
inline __attribute__((always_inline)) V interleave_low(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  if constexpr (lanes == 16) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  } else if constexpr (lanes == 8) {
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  } else if constexpr (lanes == 4) {
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
  } else {
    return __builtin_shufflevector(a, b, 0, 2);
  }
}
template <typename V>
inline __attribute__((always_inline)) V interleave_high(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  if constexpr (lanes == 16) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                   31);
  } else if constexpr (lanes == 8) {
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else if constexpr (lanes == 4) {
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  } else {
    return __builtin_shufflevector(a, b, 1, 3);
  }
}

// In place: lane j of vector i becomes lane i of vector j.
template <typename T>
inline __attribute__((always_inline)) void transpose(
    typename Vec<T>::type (&square)[Vec<T>::kSize]) {
  constexpr int lanes = Vec<T>::kSize;
#pragma GCC unroll 4
  for (int round = 1; round < lanes; round *= 2) {
    typename Vec<T>::type next[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = interleave_low(square[i], square[i + lanes / 2]);
      next[2 * i + 1] = interleave_high(square[i], square[i + lanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) square[i] = next[i];
  }
}

// row(j)[i] = from[i * stride + j] for i < rows and j < columns; reads nothing at or behind `end`.
template <typename T, typename S, typename Row>
inline void transpose_copy(const S* from, int64_t stride, int64_t rows, int64_t columns,
                           const S* end, const Row& row) {
  constexpr int64_t lanes = Vec<T>::kSize;
  for (int64_t j = 0; j < columns; j += lanes) {
    const int64_t count_j = columns - j < lanes ? columns - j : lanes;
    for (int64_t i = 0; i < rows; i += lanes) {
      const int64_t count_i = rows - i < lanes ? rows - i : lanes;
      const S* corner = from + i * stride + j;
      typename Vec<T>::type square[lanes];
      if (count_i == lanes && corner + (lanes - 1) * stride + lanes <= end) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < lanes; ++r) square[r] = load_as(corner + r * stride);
      } else {
        for (int64_t r = 0; r < lanes; ++r) {
          const S* row_of = corner + r * stride;
          const int64_t count = r < count_i ? count_j : 0;
          square[r] =
              count && row_of + lanes <= end ? load_as(row_of) : load_some<T>(row_of, count);
        }
      }
      transpose<T>(square);
      if (count_i == lanes && count_j == lanes) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < lanes; ++r) store_as(row(j + r) + i, square[r]);
      } else if (count_i == lanes) {
        for (int64_t r = 0; r < count_j; ++r) store_as(row(j + r) + i, square[r]);
      } else {
        for (int64_t r = 0; r < count_j; ++r) store_some<T>(row(j + r) + i, square[r], count_i);
      }
    }
  }
}

template <typename T, typename D, typename S>
inline void convert_copy(D* to, const S* from, int64_t count) {
  constexpr int64_t lanes = Vec<T>::kSize;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store_as(to + i, load_as(from + i));
  if (i < count) store_some<T>(to + i, load_some<T>(from + i, count - i), count - i);
}

// Calls f with `data` as a pointer to what `storage` says. Doubles are computed with as doubles,
// all else as float.
template <typename T, typename F>
inline void with_storage(Storage storage, void* data, const F& f) {
  if constexpr (sizeof(T) == 8) {
    f(static_cast<double*>(data));
  } else if (storage == Storage::kFloat) {
    f(static_cast<float*>(data));
  } else if (storage == Storage::kHalf) {
    f(static_cast<Float16*>(data));
  } else {
    f(static_cast<BFloat16*>(data));
  }
}

// Pixels [begin, end), counted through all images of `pixels` pixels, as rows of channels.
template <typename T>
void images_to_rows(const Images& images, int64_t channels, int64_t pixels, int64_t begin,
                    int64_t end, T* rows) {
  with_storage<T>(images.storage, images.data, [&](auto* data) {
    if (images.channels_last) {
      convert_copy<T>(rows + begin * channels, data + begin * channels, (end - begin) * channels);
      return;
    }
    for (int64_t pixel = begin; pixel < end;) {
      const int64_t image = pixel / pixels, first = pixel % pixels;
      const int64_t count = end - pixel < pixels - first ? end - pixel : pixels - first;
      const auto* planes = data + image * channels * pixels;
      transpose_copy<T>(planes + first, pixels, channels, count, planes + channels * pixels,
                        [&](int64_t j) { return rows + (pixel + j) * channels; });
      pixel += count;
    }
  });
}

template <typename T>
void rows_to_images(const T* rows, int64_t channels, int64_t pixels, int64_t begin, int64_t end,
                    const Images& images) {
  with_storage<T>(images.storage, images.data, [&](auto* data) {
    if (images.channels_last) {
      convert_copy<T>(data + begin * channels, rows + begin * channels, (end - begin) * channels);
      return;
    }
    for (int64_t pixel = begin; pixel < end;) {
      const int64_t image = pixel / pixels, first = pixel % pixels;
      const int64_t count = end - pixel < pixels - first ? end - pixel : pixels - first;
      auto* planes = data + image * channels * pixels + first;
      transpose_copy<T>(rows + pixel * channels, channels, count, channels,
                        rows + (pixel + count) * channels,
                        [&](int64_t j) { return planes + j * pixels; });
      pixel += count;
    }
  });
}

}  // namespace d2det::D2DET_ISA
