// What soft-NMS is told, the same on CPU and CUDA; plain data for the kernels.

#pragma once

#include <cstdint>

namespace d2det {

enum class NmsMethod : int32_t { kLinear, kGaussian, kHard };

// T is what scores and overlaps are computed in.
template <typename T>
struct NmsSettings {
  NmsMethod method;
  T iou_threshold, sigma, min_score;
};

}  // namespace d2det
