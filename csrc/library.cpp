// Schemas of all operators. Kernels register themselves in cpu/ and cuda/; an operator without one
// for a device runs its PyTorch reference there. Fake kernels, derivatives and the rules of
// autocast are in d2det/ops/. Each schema equals the one in d2det/ops/<operator>.py, which a test
// and the import check.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(d2det, m) {
  m.def(
      "modulated_deform_conv2d(Tensor input, Tensor offset, Tensor? mask, Tensor weight, "
      "Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, bool allow_tf32) -> Tensor");
  m.def(
      "modulated_deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, "
      "Tensor? mask, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, "
      "bool[4] output_mask, bool allow_tf32, bool deterministic) -> "
      "(Tensor, Tensor, Tensor, Tensor)");

  m.def(
      "deform_roi_pool(Tensor[] features, Tensor rois, Tensor levels, Tensor? offset, "
      "Tensor? modulation, int output_size, float[] spatial_scales, int sampling_ratio, "
      "float gamma, str convention) -> Tensor");
  m.def(
      "deform_roi_pool_backward(Tensor grad_output, Tensor[] features, Tensor rois, "
      "Tensor levels, Tensor? offset, Tensor? modulation, int output_size, "
      "float[] spatial_scales, int sampling_ratio, float gamma, str convention, "
      "bool[3] output_mask, bool deterministic) -> (Tensor[], Tensor, Tensor)");

  m.def(
      "adaptive_weighted_pool(Tensor features, Tensor logits, float coefficient, "
      "int kernel_size, int stride, int padding, bool normalize) -> Tensor");
  m.def(
      "adaptive_weighted_pool_backward(Tensor grad_output, Tensor features, Tensor logits, "
      "float coefficient, int kernel_size, int stride, int padding, bool normalize, "
      "bool[2] output_mask) -> (Tensor, Tensor)");

  m.def(
      "soft_nms(Tensor boxes, Tensor scores, Tensor classes, float iou_threshold, str method, "
      "float sigma, float min_score) -> (Tensor, Tensor, Tensor)");
}
