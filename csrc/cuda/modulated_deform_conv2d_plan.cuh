// Host side of the deformable convolution that forward and backward share: argument checks, sizes,
// the arithmetic that a problem gets, and its tensors in the kernels' layouts.

#pragma once

#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "modulated_deform_conv2d_layout.cuh"

namespace d2det {

struct ConvArguments {
  Tensor input, offset;
  std::optional<Tensor> mask;
  Tensor weight;
  std::vector<int64_t> stride, padding, dilation;
};

struct ConvPlan {
  ConvProblem problem;  // of the kernels: groups merged, channels padded
  Cells cells;
  WeightLayout weights;
  ScalarType type;
  bool tensor_cores;
  int64_t input_channels;

  int64_t unpadded_rows() const { return problem.images * problem.height * problem.width; }
};

inline int32_t narrow_size(const char* name, int64_t value) {
  D2DET_CHECK(value >= 0 && value <= std::numeric_limits<int32_t>::max(), name, " is ", value,
              ", which is too large");
  return static_cast<int32_t>(value);
}

// Several groups of a few channels are one of many with zeros in its weights: tensor cores then
// have whole tiles, and the gather reads whole runs of channels.
inline int64_t merged_groups(int64_t groups, int64_t group_in, int64_t group_out) {
  int64_t best = 1;
  for (int64_t count = 2; count <= groups; ++count) {
    if (groups % count == 0 && count * group_in <= 64 && count * group_out <= 128) best = count;
  }
  return best;
}

inline ConvPlan make_plan(const ConvArguments& a, bool allow_tf32) {
  D2DET_CHECK(a.input.dim() == 4 && a.weight.dim() == 4,
              "input and weight must have 4 dimensions, "
              "got ",
              shape_text(a.input), " and ", shape_text(a.weight));
  D2DET_CHECK(a.stride.size() == 2 && a.padding.size() == 2 && a.dilation.size() == 2,
              "stride, padding and dilation must have two numbers each");
  check_floating("input", a.input, {-1, -1, -1, -1}, a.input);
  const int64_t images = a.input.size(0), channels = a.input.size(1);
  const int64_t out = a.weight.size(0), source_in = a.weight.size(1);
  const int64_t kh = a.weight.size(2), kw = a.weight.size(3);
  D2DET_CHECK(channels > 0 && source_in > 0 && channels % source_in == 0 && out > 0 &&
                  out % (channels / source_in) == 0 && kh > 0 && kw > 0 && a.input.size(2) > 0 &&
                  a.input.size(3) > 0,
              "weight of shape ", shape_text(a.weight), " does not fit input of shape ",
              shape_text(a.input));
  check_floating("weight", a.weight, {out, source_in, kh, kw}, a.input);
  D2DET_CHECK(a.weight.scalar_type() == a.input.scalar_type(),
              "weight must have the dtype of input");
  int64_t sizes[2];
  for (int i = 0; i < 2; ++i) {
    D2DET_CHECK(a.stride[i] > 0 && a.padding[i] >= 0 && a.dilation[i] > 0,
                "stride and dilation must be positive, padding not negative");
    const int64_t kernel = i == 0 ? kh : kw;
    const int64_t room = a.input.size(2 + i) + 2 * a.padding[i] - a.dilation[i] * (kernel - 1) - 1;
    D2DET_CHECK(room >= 0, "weight is larger than the padded input");
    sizes[i] = room / a.stride[i] + 1;
  }
  D2DET_CHECK(a.offset.dim() == 4 && a.offset.size(1) > 0 &&
                  a.offset.size(1) % (2 * kh * kw) == 0 &&
                  channels % (a.offset.size(1) / (2 * kh * kw)) == 0,
              "offset of shape ", shape_text(a.offset), " does not fit input of shape ",
              shape_text(a.input), " and weight of shape ", shape_text(a.weight));
  const int64_t offset_groups = a.offset.size(1) / (2 * kh * kw);
  check_floating("offset", a.offset, {images, a.offset.size(1), sizes[0], sizes[1]}, a.input);
  if (a.mask) {
    check_floating("mask", *a.mask, {images, offset_groups * kh * kw, sizes[0], sizes[1]}, a.input);
  }
  for (const Tensor* value : {&a.offset, a.mask ? &*a.mask : &a.offset}) {
    D2DET_CHECK(
        value->scalar_type() == a.input.scalar_type() || value->scalar_type() == ScalarType::Float,
        "offset and mask must have the dtype of input or float32");
  }

  ConvPlan plan;
  plan.type = a.input.scalar_type();
  plan.input_channels = channels;
  const int64_t source_groups = channels / source_in, source_out = out / source_groups;
  const bool half = plan.type == ScalarType::Half || plan.type == ScalarType::BFloat16;
  const int64_t merge = merged_groups(source_groups, source_in, source_out);
  const int64_t cell = std::gcd(channels / offset_groups, merge * source_in);
  plan.tensor_cores =
      half ? cell % 8 == 0 : plan.type == ScalarType::Float && allow_tf32 && cell % 4 == 0;
  const int64_t merged = plan.tensor_cores ? merge : 1;
  const int64_t size = std::gcd(channels / offset_groups, merged * source_in);
  const int64_t unit =
      plan.tensor_cores ? (half ? 8 : 4) : (plan.type == ScalarType::Double ? 2 : 4);
  const int64_t padded = ceil_div(size, unit) * unit;
  plan.cells = {narrow_size("the number of channels", size), static_cast<int32_t>(padded)};

  ConvProblem& p = plan.problem;
  p.images = images;
  p.pixels = images * sizes[0] * sizes[1];
  p.height = narrow_size("the input's height", a.input.size(2));
  p.width = narrow_size("the input's width", a.input.size(3));
  p.channels = narrow_size("the number of channels", channels / size * padded);
  p.out_height = narrow_size("the output's height", sizes[0]);
  p.out_width = narrow_size("the output's width", sizes[1]);
  p.out_channels = narrow_size("the number of output channels", out);
  p.kernel_h = narrow_size("the kernel's height", kh);
  p.kernel_w = narrow_size("the kernel's width", kw);
  const auto steps = [&](const std::vector<int64_t>& pair, int32_t& y, int32_t& x) {
    y = narrow_size("stride, padding or dilation", pair[0]);
    x = narrow_size("stride, padding or dilation", pair[1]);
  };
  steps(a.stride, p.stride_y, p.stride_x);
  steps(a.padding, p.padding_y, p.padding_x);
  steps(a.dilation, p.dilation_y, p.dilation_x);
  p.offset_groups = static_cast<int32_t>(offset_groups);
  p.channels_per_offset_group = static_cast<int32_t>(channels / offset_groups / size * padded);
  p.groups = static_cast<int32_t>(source_groups / merged);
  p.group_in = static_cast<int32_t>(merged * source_in / size * padded);
  p.group_out = static_cast<int32_t>(merged * source_out);
  p.images_per_pixel = 1.0 / (static_cast<double>(sizes[0]) * static_cast<double>(sizes[1]));
  // The kernels count pixels within a tile's images, and positions, in 32 bits.
  const int64_t tile_images = kMaxTilePixels / (sizes[0] * sizes[1]) + 2;
  const int64_t limit = std::numeric_limits<int32_t>::max();
  for (int i = 0; i < 2; ++i) {
    narrow_size("the padded input", a.input.size(2 + i) + 2 * a.padding[i] + a.stride[i]);
  }
  D2DET_CHECK(
      tile_images * a.input.size(2) * a.input.size(3) <= limit && sizes[0] * sizes[1] <= limit,
      "an image of ", a.input.size(2), " x ", a.input.size(3), " pixels is too large");
  plan.weights = {p.taps(),
                  p.groups,
                  p.group_out,
                  p.group_in,
                  static_cast<int32_t>(source_out),
                  static_cast<int32_t>(source_in),
                  plan.cells};
  return plan;
}

template <typename MathType, typename StorageType>
struct ConvTypes {
  using Math = MathType;
  using Storage = StorageType;  // of torch's tensors
};

// Calls run(ConvTypes<Math, Storage>()) for the arithmetic that the plan has chosen.
template <typename Run>
void with_types(const ConvPlan& plan, Run&& run) {
  switch (plan.type) {
    case ScalarType::Half:
      if (plan.tensor_cores) return run(ConvTypes<TensorMath<Half>, Half>());
      return run(ConvTypes<ExactMath<float>, Half>());
    case ScalarType::BFloat16:
      if (plan.tensor_cores) return run(ConvTypes<TensorMath<BFloat16>, BFloat16>());
      return run(ConvTypes<ExactMath<float>, BFloat16>());
    case ScalarType::Float:
      if (plan.tensor_cores) return run(ConvTypes<TensorMath<Tf32>, float>());
      return run(ConvTypes<ExactMath<float>, float>());
    default:
      return run(ConvTypes<ExactMath<double>, double>());
  }
}

template <typename T>
constexpr ScalarType kScalarType = std::is_same_v<T, double>  ? ScalarType::Double
                                   : std::is_same_v<T, float> ? ScalarType::Float
                                   : std::is_same_v<T, Half>  ? ScalarType::Half
                                                              : ScalarType::BFloat16;

// Whether the kernels may read an (N, C, H, W) tensor as it lies: rows of channels, aligned.
inline bool is_rows(const Tensor& value) {
  return is_channels_last(value) && aligned16(value.const_data_ptr());
}

// (N, C, H, W) as rows of `row_channels` channels of type To; no copy where nothing changes.
template <typename From, typename To>
Tensor as_rows(const Tensor& value, int64_t row_channels, Cells cells) {
  const int64_t images = value.size(0), channels = value.size(1);
  const int64_t pixels = value.size(2) * value.size(3);
  if (std::is_same_v<From, To> && channels == row_channels && is_rows(value)) return value;
  const bool channels_last = is_channels_last(value);
  const Tensor from = channels_last ? value : torch::stable::contiguous(value);
  Tensor rows = torch::stable::new_empty(value, {images * pixels, row_channels}, kScalarType<To>);
  if (images * pixels == 0) return rows;
  const dim3 grid(static_cast<unsigned>(ceil_div(pixels, kTransposeSide)),
                  static_cast<unsigned>(ceil_div(row_channels, kTransposeSide)),
                  static_cast<unsigned>(std::min(images, kMaxGridY)));
  D2DET_LAUNCH((rows_from_images_kernel<From, To>), grid, kTransposeSide * kTransposeRows, 0,
               current_stream(value), static_cast<const From*>(from.const_data_ptr()),
               static_cast<To*>(rows.mutable_data_ptr()), images, pixels,
               static_cast<int32_t>(channels), static_cast<int32_t>(row_channels), cells,
               channels_last);
  return rows;
}

// The weights with the tap first; transposed: input channels before outputs, rows of `row_out`.
template <typename Math, typename From, bool kTransposed>
Tensor packed_weights(const ConvPlan& plan, const Tensor& weight, int64_t row_out) {
  using Column = typename Math::Column;
  const WeightLayout& layout = plan.weights;
  const Tensor from = torch::stable::contiguous(weight);
  const int64_t blocks = static_cast<int64_t>(layout.groups) * layout.taps;
  const int64_t rows = kTransposed ? layout.group_in : layout.group_out;
  const int64_t row_length = kTransposed ? row_out : layout.group_in;
  Tensor to = torch::stable::new_empty(weight, {blocks, rows, row_length}, kScalarType<Column>);
  D2DET_LAUNCH((pack_weights_kernel<Math, From, kTransposed>),
               grid_for(blocks * rows * row_length, 256), 256, 0, current_stream(weight),
               static_cast<const From*>(from.const_data_ptr()),
               static_cast<Column*>(to.mutable_data_ptr()), layout, static_cast<int32_t>(row_out));
  return to;
}

// What a block may have of shared memory.
inline size_t shared_bytes_limit(const Tensor& tensor) {
  int bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                    std::max(0, static_cast<int>(tensor.get_device_index()))),
             "cudaDeviceGetAttribute");
  return static_cast<size_t>(bytes);
}

inline Coordinates coordinates(const Tensor& value) {
  return {value.const_data_ptr(), value.scalar_type()};
}

}  // namespace d2det
