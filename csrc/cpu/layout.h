// Change of layout and of dtype: numbers are read and written as they are stored, and transposed
// in registers. Included behind the target pragma.

#pragma once

#include "simd_convert.h"
#include "simd_transpose.h"

namespace d2det::D2DET_ISA {

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
        for (int64_t r = 0; r < lanes; ++r) square[r] = load_as(corner + r * stride, T());
      } else {
        for (int64_t r = 0; r < lanes; ++r) {
          const S* row_of = corner + r * stride;
          const int64_t count = r < count_i ? count_j : 0;
          square[r] =
              count && row_of + lanes <= end ? load_as(row_of, T()) : load_some<T>(row_of, count);
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
  for (; i + lanes <= count; i += lanes) store_as(to + i, load_as(from + i, T()));
  if (i < count) store_some<T>(to + i, load_some<T>(from + i, count - i), count - i);
}

// Calls f with `data` as a pointer to numbers of a type. Doubles are computed with as doubles, all
// else as float.
template <typename T, typename F>
inline void with_element(Element type, void* data, const F& f) {
  if constexpr (sizeof(T) == 8) {
    f(static_cast<double*>(data));
  } else if (type == Element::kFloat32) {
    f(static_cast<float*>(data));
  } else if (type == Element::kFloat16) {
    f(static_cast<Float16Bits*>(data));
  } else {
    f(static_cast<BFloat16Bits*>(data));
  }
}

// Pixels [begin, end), counted through all images of `pixels` pixels, as rows of channels.
template <typename T, typename D>
void images_to_rows(const Images& images, int64_t channels, int64_t pixels, int64_t begin,
                    int64_t end, D* rows) {
  with_element<T>(images.type, images.data, [&](auto* data) {
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
  with_element<T>(images.type, images.data, [&](auto* data) {
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
