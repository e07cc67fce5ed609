// Tensors as the kernels see them: plain pointers, strides and a code for the dtype.

#pragma once

#include <cstdint>

namespace d2det {

enum class Element : int32_t { kFloat64, kFloat32, kFloat16, kBFloat16 };

// Half-precision numbers in memory; kernels widen them to float.
struct Float16Bits {
  uint16_t bits;
};
struct BFloat16Bits {
  uint16_t bits;
};

// (channels, pixels) of one image or RoI. One of the strides, in elements, is 1.
struct Pixels {
  void* data;
  Element type;
  int64_t channel_stride, pixel_stride;
};

}  // namespace d2det
