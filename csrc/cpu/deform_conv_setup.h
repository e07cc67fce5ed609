// What the forward and the backward of deformable convolution share on CPU: checks, the description
// of the problem, the layout that the kernels read.

#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "../tensor.h"
#include "deform_conv_problem.h"
#include "isa.h"
#include "pixels.h"

namespace d2det {

D2DET_FOR_EACH_ISA(
    template <typename T> ConvTraits conv_traits(); template <typename T, typename D>
    void images_to_rows(const Images&, int64_t channels, int64_t pixels, int64_t begin, int64_t end,
                        D* rows);
    template <typename T> void rows_to_images(const T* rows, int64_t channels, int64_t pixels,
                                              int64_t begin, int64_t end, const Images&);
    template <typename T> void pack_for_forward(const ConvProblem<T>&, const T* weight,
                                                int64_t begin, int64_t end, T* packed);
    template <typename T> void pack_for_backward(const ConvProblem<T>&, const T* weight,
                                                 int64_t begin, int64_t end, T* packed);
    template <typename T>
    void deform_conv_forward(const ConvForward<T>&, int64_t begin, int64_t count, char* scratch);
    template <typename T> void deform_conv_backward(const ConvBackward<T>&, char* scratch);
    template <typename T>
    void unpack_weight_gradient(const ConvProblem<T>&, T* packed, int64_t copies, int64_t begin,
                                int64_t end, T* weight);
    template <typename T>
    void add_copies(T* sum, int64_t size, int64_t copies, int64_t begin, int64_t end);)

template <typename T>
constexpr ScalarType kScalar = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

// Sizes of the checked arguments; `sizes` holds stride, padding and dilation.
ConvShape conv_shape(const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
                     const Tensor& weight, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation);

// Panels of `channels` channels in runs of `run`, the channels of a group, cut at multiples of
// `cut` too.
struct PanelList {
  std::vector<Panel> items;
  std::vector<int64_t> starts;
  int32_t vectors;

  PanelList(int64_t channels, int64_t run, int64_t cut, int64_t lanes);
  Panels view() const {
    return {items.data(), starts.data(), static_cast<int64_t>(items.size()), vectors};
  }
};

// A tensor that is contiguous or channels_last, as the kernels see it.
inline Images images(const Tensor& value) {
  return {value.data_ptr(), element_of(value), !value.is_contiguous()};
}
inline Tensor as_images(const Tensor& value) {
  return is_channels_last(value) || value.is_contiguous() ? value
                                                          : torch::stable::contiguous(value);
}

// The same values in T, contiguous, and from a contiguous tensor in T to a channels_last one: as
// torch copies them, but in blocks, which for the large weights of a channels_last model counts.
template <typename T>
Tensor contiguous_in(const Tensor& value);
template <typename T>
void copy_to_channels_last(const Tensor& from, const Tensor& to);

// One thread's memory for the kernels, aligned to a cache line.
class Memory {
 public:
  explicit Memory(int64_t bytes) : memory_(new char[bytes + 64]) {}
  char* data() const {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + (64 - address % 64) % 64;
  }

 private:
  std::unique_ptr<char[]> memory_;
};

// All that a problem points to.
template <typename T>
struct ConvTensors {
  PanelList in, out;
  Tensor rows, offset;
  std::optional<Tensor> mask;
  ConvProblem<T> problem;

  ConvTensors(const ConvShape& shape, const Tensor& given_input, const Tensor& given_offset,
              const std::optional<Tensor>& given_mask);

 private:
  // Products of bfloat16 where the operands are that, the processor has them, and every sum runs
  // over whole pairs. Columns are rounded to bfloat16 then, as the inputs of a plain convolution
  // are.
  bool multiplies_bf16(ScalarType type) const;
};

}  // namespace d2det
