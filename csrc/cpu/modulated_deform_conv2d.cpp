// Deformable convolution on CPU: tiles of output pixels in parallel.

#include "deform_conv_setup.h"

namespace d2det {
namespace {

// Bytes that columns and sums of one tile may take: they are to stay in the second-level cache.
constexpr int64_t kTileBytes = 400 << 10;
// Length of a sum that is made at a time: long enough that reading and writing sums does not count.
constexpr int64_t kBlockLength = 512;

template <typename T>
Tensor forward(const ConvShape& s, const Tensor& input, const Tensor& offset,
               const std::optional<Tensor>& mask, const Tensor& weight,
               const std::optional<Tensor>& bias) {
  Tensor output = new_output(input, {s.images, s.out_channels, s.out_height, s.out_width});
  if (output.numel() == 0) return output;
  const ConvTraits traits = D2DET_SELECT_ISA(conv_traits<T>)();
  ConvTensors<T> tensors(s, input, offset, mask);
  ConvForward<T> pass{};
  pass.problem = tensors.problem;
  ConvProblem<T>& problem = pass.problem;
  const int64_t taps = s.kernel_y * s.kernel_x, per_group = s.channels / s.groups;
  const int64_t threads = torch::stable::get_num_threads();

  const Tensor given_weight = contiguous_in<T>(weight);
  const int64_t out_row = problem.out.vectors * traits.lanes;
  const int64_t in_row = problem.in.vectors * traits.lanes;
  Memory packed(problem.out.count * taps * per_group * out_row * sizeof(T));
  problem.packed = packed.data();
  torch::stable::parallel_for(0, problem.out.count, 1, [&](int64_t begin, int64_t end) {
    D2DET_SELECT_ISA(pack_for_forward<T>)
    (problem, given_weight.const_data_ptr<T>(), begin, end, reinterpret_cast<T*>(packed.data()));
  });
  const std::optional<Tensor> given_bias =
      bias ? std::optional<Tensor>(as(*bias, kScalar<T>)) : std::nullopt;
  pass.bias = given_bias ? given_bias->const_data_ptr<T>() : nullptr;
  pass.output = images(output);

  const int64_t column_width = problem.in.count * in_row, sum_width = problem.out.count * out_row;
  pass.block_taps = std::clamp<int64_t>(kBlockLength / column_width, 1, taps);
  const int64_t all = s.images * s.out_height * s.out_width;
  const int64_t fitting = std::max<int64_t>(
      kTileBytes / ((pass.block_taps * column_width + sum_width) * static_cast<int64_t>(sizeof(T))),
      traits.rows);
  // As many tiles for every thread, of sizes that differ by the rows of one product at most.
  const int64_t units = (all + traits.rows - 1) / traits.rows;
  const int64_t wanted = (all + fitting - 1) / fitting;
  const int64_t tiles = std::min((wanted + threads - 1) / threads * threads, units);
  problem.tile = (units + tiles - 1) / tiles * traits.rows;
  const int64_t bytes =
      problem.tile * ((pass.block_taps * column_width + sum_width + 8) * sizeof(T) + 16) + 1024;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    const Memory scratch(bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = units * i / tiles * traits.rows;
      const int64_t last = std::min(units * (i + 1) / tiles * traits.rows, all);
      D2DET_SELECT_ISA(deform_conv_forward<T>)(pass, first, last - first, scratch.data());
    }
  });
  return output;
}

Tensor modulated_deform_conv2d(const Tensor& input, const Tensor& offset,
                               const std::optional<Tensor>& mask, const Tensor& weight,
                               const std::optional<Tensor>& bias, std::vector<int64_t> stride,
                               std::vector<int64_t> padding, std::vector<int64_t> dilation,
                               bool /*allow_tf32*/) {
  const ConvShape shape = conv_shape(input, offset, mask, weight, stride, padding, dilation);
  if (bias) check_floating("bias", *bias, {shape.out_channels}, input);
  const auto run = input.scalar_type() == ScalarType::Double ? &forward<double> : &forward<float>;
  return run(shape, input, offset, mask, weight, bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2det, CPU, m) {
  m.impl("modulated_deform_conv2d", TORCH_BOX(&modulated_deform_conv2d));
}

}  // namespace d2det
