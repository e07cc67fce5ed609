// What every kernel's wrapper uses of torch, all of it from torch's stable ABI (see README.md):
// tensors, argument checks, memory formats, the choice of a dtype.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace d2det {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

// Raises Python's RuntimeError: the one error that crosses the stable ABI. The public functions in
// d2det/ops have checked their arguments before, with ValueError and TypeError; these checks keep a
// direct call of torch.ops.d2det.* from reading outside of its tensors.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define D2DET_CHECK(condition, ...)               \
  do {                                            \
    if (!(condition)) ::d2det::fail(__VA_ARGS__); \
  } while (false)

inline std::string shape_text(const int64_t* sizes, size_t count) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < count; ++i) text << (i ? ", " : "") << sizes[i];
  text << ")";
  return text.str();
}

inline std::string shape_text(const Tensor& value) {
  return shape_text(value.sizes().data(), static_cast<size_t>(value.dim()));
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline void check_device(const char* name, const Tensor& value, const Tensor& like) {
  D2DET_CHECK(
      value.is_cuda() == like.is_cuda() && value.get_device_index() == like.get_device_index(),
      name, " is on another device than the first tensor argument");
}

// A floating-point tensor of the given shape (-1: any size) on the device of `like`.
inline void check_floating(const char* name, const Tensor& value, const std::vector<int64_t>& sizes,
                           const Tensor& like) {
  D2DET_CHECK(is_floating(value.scalar_type()), name, " must be floating point, got ",
              torch::headeronly::toString(value.scalar_type()));
  check_device(name, value, like);
  bool fits = value.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) {
    fits = sizes[i] == -1 || sizes[i] == value.size(static_cast<int64_t>(i));
  }
  D2DET_CHECK(fits, name, " must have shape ", shape_text(sizes.data(), sizes.size()),
              " (-1: any), got ", shape_text(value));
}

// A vector of `length` int64 numbers on the device of `like`.
inline void check_indices(const char* name, const Tensor& value, int64_t length,
                          const Tensor& like) {
  D2DET_CHECK(value.scalar_type() == ScalarType::Long, name, " must be int64, got ",
              torch::headeronly::toString(value.scalar_type()));
  check_device(name, value, like);
  D2DET_CHECK(value.dim() == 1 && value.size(0) == length, name, " must have shape (", length,
              ",), got ", shape_text(value));
}

// Whether the strides are those of torch.channels_last (sizes of 1 do not matter).
inline bool is_channels_last(const Tensor& value) {
  if (value.dim() != 4) return false;
  int64_t expected = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (value.size(dim) != 1 && value.stride(dim) != expected) return false;
    expected *= value.size(dim);
  }
  return true;
}

// An empty tensor of another shape that is channels_last where `like` is: the memory format that
// the fake kernels state (d2det/ops/reference/gather.py, new_output).
inline Tensor new_output(const Tensor& like, const std::vector<int64_t>& sizes) {
  const bool channels_last = is_channels_last(like) && !like.is_contiguous();
  return torch::stable::empty(
      sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// What coordinates and sums are computed in: double for double, else float.
inline ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Same values in another dtype, contiguous in the given format; no copy where nothing changes.
inline Tensor as(const Tensor& value, ScalarType type,
                 MemoryFormat format = MemoryFormat::Contiguous) {
  return torch::stable::contiguous(
      value.scalar_type() == type ? value : torch::stable::to(value, type), format);
}

}  // namespace d2det
