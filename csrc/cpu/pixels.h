// From torch's tensors to what the kernels take (element.h), and their scratch memory.

#pragma once

#include <cstddef>
#include <memory>
#include <new>

#include "../tensor.h"
#include "element.h"

namespace d2det {

inline Element element_of(const Tensor& value) {
  switch (value.scalar_type()) {
    case ScalarType::Double:
      return Element::kFloat64;
    case ScalarType::Half:
      return Element::kFloat16;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      return Element::kFloat32;
  }
}

// The format to work in: the one that needs no copy, if there is one.
inline MemoryFormat format_of(const Tensor& value) {
  const bool channels_last = is_channels_last(value) && !value.is_contiguous();
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// Of image `n` of an (N, C, H, W) tensor that is contiguous in `format`.
inline Pixels pixels_of(const Tensor& value, MemoryFormat format, int64_t n) {
  const int64_t channels = value.size(1), pixels = value.size(2) * value.size(3);
  auto* data = static_cast<char*>(const_cast<void*>(value.const_data_ptr()));
  data += n * channels * pixels * static_cast<int64_t>(value.element_size());
  if (format == MemoryFormat::ChannelsLast) return {data, element_of(value), 1, channels};
  return {data, element_of(value), pixels, 1};
}

// Asks for large pages where memory of this size is about to be written for the first time: to get
// it in pages of 4 KiB can take longer than to fill it. Pages that are only partly within stay.
void use_large_pages(void* data, int64_t bytes);
inline const Tensor& use_large_pages(const Tensor& fresh) {
  use_large_pages(const_cast<void*>(fresh.const_data_ptr()),
                  fresh.numel() * static_cast<int64_t>(fresh.element_size()));
  return fresh;
}

// A gradient of `like`: `result` has the strides of torch.empty_like and `work` is contiguous in
// `format`. They are one tensor wherever possible; finish() copies where it is not.
struct GradientTensor {
  Tensor result, work;

  GradientTensor(const Tensor& like, ScalarType type, MemoryFormat format)
      : result(torch::stable::empty_like(like)), work(result) {
    const bool fits =
        result.scalar_type() == type &&
        (format == MemoryFormat::ChannelsLast ? is_channels_last(result) : result.is_contiguous());
    if (!fits) {
      const auto sizes = like.sizes();
      work = torch::stable::empty(sizes, type, std::nullopt, like.device(), std::nullopt, format);
    }
  }

  Tensor finish() {
    if (work.const_data_ptr() != result.const_data_ptr()) torch::stable::copy_(result, work);
    return result;
  }
};

// Uninitialised memory that starts at a cache line.
template <typename T>
struct Scratch {
  struct Free {
    void operator()(T* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
  };
  std::unique_ptr<T[], Free> memory;

  explicit Scratch(int64_t count)
      : memory(static_cast<T*>(::operator new[](
            static_cast<size_t>(count > 0 ? count : 1) * sizeof(T), std::align_val_t(64)))) {}
  T* get() const { return memory.get(); }
};

}  // namespace d2det
