// Checks of a kernel's arguments. The public Python functions have checked already; these keep a
// direct call of torch.ops.d2det.* from reading outside of its tensors.

#pragma once

#include <ATen/ATen.h>

namespace d2det {

// A floating-point tensor of the given shape (-1: any size) on the device of `like`.
inline void check_floating(const char* name, const at::Tensor& value, at::IntArrayRef sizes,
                           const at::Tensor& like) {
  TORCH_CHECK_TYPE(value.is_floating_point(), name, " must be floating point, got ",
                   value.scalar_type());
  TORCH_CHECK_VALUE(value.device() == like.device(), name, " is on ", value.device(), ", expected ",
                    like.device());
  bool fits = value.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) {
    fits = sizes[i] == -1 || sizes[i] == value.size(i);
  }
  TORCH_CHECK_VALUE(fits, name, " must have shape ", sizes, " (-1: any), got ", value.sizes());
}

// A vector of `length` int64 numbers on the device of `like`.
inline void check_indices(const char* name, const at::Tensor& value, int64_t length,
                          const at::Tensor& like) {
  TORCH_CHECK_TYPE(value.scalar_type() == at::kLong, name, " must be int64, got ",
                   value.scalar_type());
  TORCH_CHECK_VALUE(value.device() == like.device(), name, " is on ", value.device(), ", expected ",
                    like.device());
  TORCH_CHECK_VALUE(value.dim() == 1 && value.size(0) == length, name, " must have shape [", length,
                    "], got ", value.sizes());
}

}  // namespace d2det
