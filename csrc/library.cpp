// Schemas of all operators. Kernels register themselves in cpu/ and cuda/; an operator without one
// for a device runs its PyTorch reference there. Fake kernels and derivatives are in d2det/ops/.
// Each schema equals the one in d2det/ops/<operator>.py, which a test and the import check.

#include <Python.h>
#include <torch/library.h>

#include <vector>

// The file is loaded with torch.ops.load_library; some linkers insist on a module all the same.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

TORCH_LIBRARY(d2det, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  m.def(
      "modulated_deform_conv2d(Tensor input, Tensor offset, Tensor? mask, Tensor weight, "
      "Tensor? bias, int[2] stride, int[2] padding, int[2] dilation) -> Tensor",
      tags);
  m.def(
      "modulated_deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, "
      "Tensor? mask, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, "
      "bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
      tags);

  m.def(
      "deform_roi_pool(Tensor[] features, Tensor rois, Tensor levels, Tensor? offset, "
      "Tensor? modulation, int output_size, float[] spatial_scales, int sampling_ratio, "
      "float gamma, str convention) -> Tensor",
      tags);
  m.def(
      "deform_roi_pool_backward(Tensor grad_output, Tensor[] features, Tensor rois, "
      "Tensor levels, Tensor? offset, Tensor? modulation, int output_size, "
      "float[] spatial_scales, int sampling_ratio, float gamma, str convention, "
      "bool[3] output_mask) -> (Tensor[], Tensor, Tensor)",
      tags);

  m.def(
      "adaptive_weighted_pool(Tensor features, Tensor logits, float coefficient, "
      "int kernel_size, int stride, int padding, bool normalize) -> Tensor",
      tags);
  m.def(
      "adaptive_weighted_pool_backward(Tensor grad_output, Tensor features, Tensor logits, "
      "float coefficient, int kernel_size, int stride, int padding, bool normalize, "
      "bool[2] output_mask) -> (Tensor, Tensor)",
      tags);

  m.def(
      "soft_nms(Tensor boxes, Tensor scores, Tensor classes, float iou_threshold, str method, "
      "float sigma, float min_score) -> (Tensor, Tensor, Tensor)",
      tags);
}
