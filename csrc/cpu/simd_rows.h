// Between a tensor in either memory format and rows: one row of channels for each pixel, in float
// or double, the last vector of a row filled up with zeros. Included behind the target pragma.

#pragma once

#include "simd_convert.h"
#include "simd_transpose.h"

namespace d2det::D2DET_ISA {

// Channels [0, channels) of one block of at most a vector, of all pixels.
template <typename T, typename S>
void load_block(const S* from, const Pixels& source, int64_t pixels, int64_t channels, T* rows,
                int64_t row_stride) {
  constexpr int64_t kSize = Vec<T>::kSize;
  if (source.channel_stride == 1) {
    for (int64_t p = 0; p < pixels; ++p) {
      const S* pixel = from + p * source.pixel_stride;
      store(rows + p * row_stride,
            channels == kSize ? load_as(pixel, T()) : load_some<T>(pixel, channels));
    }
    return;
  }
  for (int64_t next = 0; next < pixels; next += kSize) {
    // The last square begins earlier where it can: whole vectors are faster than parts.
    const int64_t p = next + kSize > pixels && pixels >= kSize ? pixels - kSize : next;
    const int64_t count = pixels - p < kSize ? pixels - p : kSize;
    typename Vec<T>::type square[kSize];
    if (count == kSize && channels == kSize) {
#pragma GCC unroll 16
      for (int64_t c = 0; c < kSize; ++c) {
        square[c] = load_as(from + c * source.channel_stride + p, T());
      }
    } else {
      for (int64_t c = 0; c < kSize; ++c) {
        square[c] = c < channels ? load_some<T>(from + c * source.channel_stride + p, count)
                                 : typename Vec<T>::type{};
      }
    }
    transpose<T>(square);
    if (count == kSize) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSize; ++i) store(rows + (p + i) * row_stride, square[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) store(rows + (p + i) * row_stride, square[i]);
    }
  }
}

template <typename T, typename S>
void store_block(const T* rows, int64_t row_stride, S* to, const Pixels& target, int64_t pixels,
                 int64_t channels) {
  constexpr int64_t kSize = Vec<T>::kSize;
  if (target.channel_stride == 1) {
    for (int64_t p = 0; p < pixels; ++p) {
      S* pixel = to + p * target.pixel_stride;
      const auto value = load(rows + p * row_stride);
      if (channels == kSize) {
        store_as(pixel, value);
      } else {
        store_some<T>(pixel, value, channels);
      }
    }
    return;
  }
  for (int64_t next = 0; next < pixels; next += kSize) {
    // The last square begins earlier where it can: whole vectors are faster than parts.
    const int64_t p = next + kSize > pixels && pixels >= kSize ? pixels - kSize : next;
    const int64_t count = pixels - p < kSize ? pixels - p : kSize;
    typename Vec<T>::type square[kSize];
    if (count == kSize && channels == kSize) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSize; ++i) square[i] = load(rows + (p + i) * row_stride);
      transpose<T>(square);
#pragma GCC unroll 16
      for (int64_t c = 0; c < kSize; ++c) store_as(to + c * target.channel_stride + p, square[c]);
      continue;
    }
    for (int64_t i = 0; i < kSize; ++i) {
      square[i] = i < count ? load(rows + (p + i) * row_stride) : typename Vec<T>::type{};
    }
    transpose<T>(square);
    for (int64_t c = 0; c < channels; ++c) {
      store_some<T>(to + c * target.channel_stride + p, square[c], count);
    }
  }
}

// Calls do(pointer to the first number) with the pointer of the tensor's type. Double tensors are
// worked on in double, all others in float.
template <typename Function>
inline __attribute__((always_inline)) void with_pointer(const Pixels& tensor, double,
                                                        Function run) {
  run(static_cast<double*>(tensor.data));
}
template <typename Function>
inline __attribute__((always_inline)) void with_pointer(const Pixels& tensor, float, Function run) {
  if (tensor.type == Element::kFloat32) return run(static_cast<float*>(tensor.data));
  if (tensor.type == Element::kFloat16) return run(static_cast<Float16Bits*>(tensor.data));
  run(static_cast<BFloat16Bits*>(tensor.data));
}

// rows[p * row_stride + c] = source(first_channel + c, first_pixel + p)
template <typename T>
void load_rows(const Pixels& source, int64_t first_channel, int64_t channels, int64_t first_pixel,
               int64_t pixels, T* rows, int64_t row_stride) {
  constexpr int64_t kSize = Vec<T>::kSize;
  with_pointer(source, T(), [&](const auto* data) {
    data += first_channel * source.channel_stride + first_pixel * source.pixel_stride;
    for (int64_t c = 0; c < channels; c += kSize) {
      const int64_t some = channels - c < kSize ? channels - c : kSize;
      load_block(data + c * source.channel_stride, source, pixels, some, rows + c, row_stride);
    }
  });
}

// target(first_channel + c, first_pixel + p) = rows[p * row_stride + c]
template <typename T>
void store_rows(const T* rows, int64_t row_stride, const Pixels& target, int64_t first_channel,
                int64_t channels, int64_t first_pixel, int64_t pixels) {
  constexpr int64_t kSize = Vec<T>::kSize;
  with_pointer(target, T(), [&](auto* data) {
    data += first_channel * target.channel_stride + first_pixel * target.pixel_stride;
    for (int64_t c = 0; c < channels; c += kSize) {
      const int64_t some = channels - c < kSize ? channels - c : kSize;
      store_block(rows + c, row_stride, data + c * target.channel_stride, target, pixels, some);
    }
  });
}

}  // namespace d2det::D2DET_ISA
