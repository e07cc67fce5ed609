// The arguments of the operator soft_nms, checked and read in one place for CPU and CUDA.

#pragma once

#include "soft_nms.h"
#include "tensor.h"

namespace d2det {

inline NmsMethod parse_nms_method(const std::string& name) {
  if (name == "linear") return NmsMethod::kLinear;
  if (name == "gaussian") return NmsMethod::kGaussian;
  D2DET_CHECK(name == "hard", "method must be linear, gaussian or hard, got ", name);
  return NmsMethod::kHard;
}

inline NmsSettings<double> check_soft_nms(const Tensor& boxes, const Tensor& scores,
                                          const Tensor& classes, double iou_threshold,
                                          const std::string& method, double sigma,
                                          double min_score) {
  check_floating("boxes", boxes, {-1, 4}, boxes);
  check_floating("scores", scores, {boxes.size(0)}, boxes);
  check_indices("classes", classes, boxes.size(0), boxes);
  D2DET_CHECK(min_score >= 0 && sigma > 0, "min_score must be at least 0 and sigma above 0");
  return {parse_nms_method(method), iou_threshold, sigma, min_score};
}

// Calls run(settings) with settings in double where boxes or scores are, else in float.
template <typename Run>
auto with_nms_settings(const Tensor& boxes, const Tensor& scores,
                       const NmsSettings<double>& settings, const Run& run) {
  if (boxes.scalar_type() == ScalarType::Double || scores.scalar_type() == ScalarType::Double) {
    return run(settings);
  }
  return run(NmsSettings<float>{settings.method, static_cast<float>(settings.iou_threshold),
                                static_cast<float>(settings.sigma),
                                static_cast<float>(settings.min_score)});
}

}  // namespace d2det
