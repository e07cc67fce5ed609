// Modulated deformable convolution on a GPU, backward: gradients of input, offset and mask by way
// of the columns' gradient, and of the weights.

#include "modulated_deform_conv2d_grad_weight.cuh"
#include "modulated_deform_conv2d_input_sums.cuh"
#include "modulated_deform_conv2d_plan.cuh"
#include "modulated_deform_conv2d_scatter.cuh"

namespace d2det {
namespace {

// Of the columns' gradient that exists at a time, but at least one image: what the cache of a large
// GPU holds.
#if defined(D2DET_EMULATE_CUDA)
constexpr int64_t kColumnBytes = int64_t{64} << 10;  // so that small tests take several steps
#else
constexpr int64_t kColumnBytes = int64_t{40} << 20;
#endif

struct Gradients {
  Tensor input, offset, mask, weight;
};

struct Wanted {
  bool input, offset, mask, weight;
};

template <typename Math, typename Tile>
void launch_column_gradient(const ConvProblem& p, const Operands& operands, const Tensor& weight,
                            Tensor& columns, PixelRange range) {
  using Column = typename Math::Column;
  const int64_t channel_tiles = ceil_div(p.group_in, Tile::kChannels);
  const int64_t blocks =
      ceil_div(range.end - range.begin, Tile::kPixels) * p.taps() * channel_tiles;
  D2DET_CHECK(blocks <= std::numeric_limits<int32_t>::max() && p.groups <= kMaxGridY,
              "an image is too large");
  D2DET_LAUNCH((column_gradient_kernel<Math, Tile>),
               dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(p.groups)), Tile::kThreads,
               (column_gradient_shared_bytes<Math, Tile>()), current_stream(columns), p,
               static_cast<const Column*>(operands.grad.const_data_ptr()),
               static_cast<const Column*>(weight.const_data_ptr()),
               static_cast<Column*>(columns.mutable_data_ptr()), range, operands.row_out,
               static_cast<int32_t>(channel_tiles));
}

// kInput: the input's gradient in fixed point; else those of offset and mask.
template <typename Math, bool kInput>
void launch_samples(const ConvProblem& p, const Operands& operands, const Tensor& columns,
                    const FixedPointSums& input, const Coordinates& grad_offset,
                    const Coordinates& grad_mask, PixelRange range) {
  using Column = typename Math::Column;
  const int64_t tiles = ceil_div(range.end - range.begin, kSamplePixels);
  // Taps in one block find each other's pixels in its cache; few tiles share the GPU by taps.
  const int64_t wanted = int64_t{8} * multiprocessor_count(columns);
  const int64_t parts =
      std::min<int64_t>(p.taps(), ceil_div(wanted, std::max<int64_t>(1, tiles * p.offset_groups)));
  D2DET_CHECK(tiles <= std::numeric_limits<int32_t>::max() && p.offset_groups <= kMaxGridY,
              "offset has too many groups or pixels");
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(std::min(parts, kMaxGridY)),
                  static_cast<unsigned>(p.offset_groups));
  D2DET_LAUNCH((sample_gradient_kernel<Math, kInput>), grid, kSampleThreads, 0,
               current_stream(columns), p,
               static_cast<const Column*>(operands.input.const_data_ptr()),
               static_cast<const Column*>(columns.const_data_ptr()), operands.offset_at,
               operands.mask_at, input, grad_offset, grad_mask, range);
}

template <typename Math>
void launch_scatter(const ConvProblem& p, const Operands& operands, const Tensor& columns,
                    typename Math::Sum* sums, int64_t first_image, int64_t images) {
  using Column = typename Math::Column;
  using Sum = typename Math::Sum;
  const int64_t tiles =
      ceil_div(p.out_width, kScatterSide) * ceil_div(p.out_height, kScatterSide) * images;
  D2DET_CHECK(tiles <= std::numeric_limits<int32_t>::max() && p.offset_groups <= kMaxGridY &&
                  images * p.image_pixels() * p.taps() <= std::numeric_limits<int32_t>::max(),
              "offset has too many groups or pixels");
  // A block's sorting serves all of its channels; few tiles share the GPU by channels.
  constexpr int32_t kStep = 8 * Math::kUnit;
  const int64_t steps = ceil_div(p.channels_per_offset_group, kStep);
  const int64_t wanted = int64_t{4} * multiprocessor_count(columns);
  const int64_t parts =
      std::min(steps, ceil_div(wanted, std::max<int64_t>(1, tiles * p.offset_groups)));
  const int32_t channels = static_cast<int32_t>(ceil_div(steps, parts)) * kStep;
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>(ceil_div(p.channels_per_offset_group, channels)),
                  static_cast<unsigned>(p.offset_groups));
  D2DET_LAUNCH((scatter_kernel<Math>), grid, kScatterThreads, sizeof(ScatterShared<Sum>),
               current_stream(columns), p, static_cast<const Column*>(columns.const_data_ptr()),
               operands.offset_at, operands.mask_at, sums, first_image, channels);
}

using LargeProduct = ProductTile<128, 128, 2, 4>;
using SmallProduct = ProductTile<64, 64, 2, 4>;

template <typename Math, typename Storage>
void run_samples(const ConvPlan& plan, const ConvArguments& a, const Operands& operands,
                 const Wanted& wanted, bool deterministic, Gradients& result) {
  using Column = typename Math::Column;
  using Sum = typename Math::Sum;
  const ConvProblem& p = plan.problem;
  const Tensor weight = packed_weights<Math, Storage, true>(plan, a.weight, operands.row_out);
  std::optional<InputSums<Math, Storage>> sums;
  if (wanted.input) {
    sums.emplace(plan, operands, weight, a.mask.has_value(), deterministic, result.input);
  }
  // The kernels write in order; a gradient of other strides gets a copy.
  const auto plain = [](const Tensor& value) {
    return value.is_contiguous()
               ? value
               : torch::stable::new_empty(value, value.sizes().vec(), value.scalar_type());
  };
  const auto finish = [](Tensor& value, const Tensor& written) {
    if (value.const_data_ptr() != written.const_data_ptr()) torch::stable::copy_(value, written);
  };
  Tensor grad_offset = wanted.offset ? plain(result.offset) : result.offset;
  Tensor grad_mask = wanted.mask ? plain(result.mask) : result.mask;
  const Coordinates none{nullptr, ScalarType::Float};
  const Coordinates offset_to = wanted.offset ? coordinates(grad_offset) : none;
  const Coordinates mask_to = wanted.mask ? coordinates(grad_mask) : none;

  const int64_t row = static_cast<int64_t>(p.taps()) * p.channels;
  const int64_t image_bytes = p.image_pixels() * row * static_cast<int64_t>(sizeof(Column));
  const int64_t step = std::clamp<int64_t>(kColumnBytes / image_bytes, 1, p.images);
  Tensor columns =
      torch::stable::new_empty(operands.input, {step * p.image_pixels(), row}, kScalarType<Column>);
  for (int64_t image = 0; image < p.images; image += step) {
    const int64_t images = std::min(step, p.images - image);
    const PixelRange range{image * p.image_pixels(), (image + images) * p.image_pixels()};
    if (!plan.tensor_cores || p.group_in <= 64) {
      launch_column_gradient<Math, SmallProduct>(p, operands, weight, columns, range);
    } else if constexpr (!std::is_same_v<Math, ExactMath<Sum>>) {
      launch_column_gradient<Math, LargeProduct>(p, operands, weight, columns, range);
    }
    if (wanted.offset || wanted.mask) {
      launch_samples<Math, false>(p, operands, columns, {}, offset_to, mask_to, range);
    }
    if (sums && !deterministic) {
      launch_scatter<Math>(p, operands, columns, sums->sums(), image, images);
    } else if (sums) {
      for (const auto pass : {FixedPointSums::Pass::kSum, FixedPointSums::Pass::kPoison}) {
        FixedPointSums to = sums->fixed();
        to.pass = pass;
        launch_samples<Math, true>(p, operands, columns, to, none, none, range);
      }
    }
  }
  if (sums) sums->finish();
  if (wanted.offset) finish(result.offset, grad_offset);
  if (wanted.mask) finish(result.mask, grad_mask);
}

// Runs of at most `length` channels with one offset group, in the weight group that has most.
int64_t most_runs(const ConvProblem& p, int32_t length) {
  int64_t most = 0;
  for (int64_t group = 0; group < p.groups; ++group) {
    const int64_t end = (group + 1) * p.group_in;
    int64_t runs = 0;
    for (int64_t channel = group * p.group_in; channel < end; ++runs) {
      const int64_t offset_group = channel / p.channels_per_offset_group;
      const int64_t limit = (offset_group + 1) * p.channels_per_offset_group;
      channel = std::min({channel + length, limit, end});
    }
    most = std::max(most, runs);
  }
  return most;
}

template <typename Math, typename Tile, typename Storage>
void launch_weight_gradient(const ConvPlan& plan, const Operands& operands, Tensor& result) {
  using Column = typename Math::Column;
  using Sum = typename Math::Sum;
  using Step = WeightStep<Math, Tile>;
  const ConvProblem& p = plan.problem;
  const cudaStream_t stream = current_stream(operands.input);
  const int64_t output_tiles = ceil_div(p.group_out, Tile::kOutputs);
  const int64_t input_tiles = most_runs(p, Tile::kInputs);
  const int64_t tiles = output_tiles * input_tiles * p.taps();
  const int64_t steps = ceil_div(p.pixels, Step::kPixels);
  const int64_t weights = static_cast<int64_t>(p.groups) * p.taps() * p.group_out * p.group_in;
  // Two blocks a multiprocessor, but no fewer than four steps each, and partial sums of at most
  // 64 MiB.
  int64_t splits = ceil_div(int64_t{2} * multiprocessor_count(operands.input),
                            std::max<int64_t>(1, tiles * p.groups));
  splits = std::min(
      {splits, ceil_div(steps, 4), kMaxGridY,
       std::max<int64_t>(1, (int64_t{64} << 20) / (weights * static_cast<int64_t>(sizeof(Sum))))});
  const int64_t steps_per_split = ceil_div(steps, splits);
  splits = ceil_div(steps, steps_per_split);
  D2DET_CHECK(tiles <= std::numeric_limits<int32_t>::max() && p.groups <= kMaxGridY,
              "weight has too many channels");
  Tensor partial = torch::stable::new_empty(operands.input, {splits, weights}, kScalarType<Sum>);
  D2DET_LAUNCH((weight_gradient_kernel<Math, Tile>),
               dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(p.groups),
                    static_cast<unsigned>(splits)),
               Tile::kThreads, Step::kSharedBytes, stream, p,
               static_cast<const Column*>(operands.grad.const_data_ptr()),
               static_cast<const Column*>(operands.input.const_data_ptr()), operands.offset_at,
               operands.mask_at, static_cast<Sum*>(partial.mutable_data_ptr()), operands.row_out,
               static_cast<int32_t>(output_tiles), static_cast<int32_t>(input_tiles),
               steps_per_split);
  Tensor target = result.is_contiguous() ? result
                                         : torch::stable::new_empty(result, result.sizes().vec(),
                                                                    result.scalar_type());
  D2DET_LAUNCH((sum_weight_gradient_kernel<Sum, Storage>), grid_for(target.numel(), 256), 256, 0,
               stream, static_cast<const Sum*>(partial.const_data_ptr()),
               static_cast<Storage*>(target.mutable_data_ptr()), plan.weights,
               static_cast<int32_t>(splits), target.numel());
  if (target.mutable_data_ptr() != result.mutable_data_ptr()) torch::stable::copy_(result, target);
}

using LargeWeights = WeightTile<128, 128, 2, 4>;
using SmallWeights = WeightTile<64, 64, 2, 4>;

template <typename Math, typename Storage>
void run_weights(const ConvPlan& plan, const Operands& operands, Tensor& result) {
  const ConvProblem& p = plan.problem;
  const int32_t run = std::min(p.group_in, p.channels_per_offset_group);
  if constexpr (!std::is_same_v<Math, ExactMath<typename Math::Sum>>) {
    if (p.group_out > 64 && run > 64) {
      return launch_weight_gradient<Math, LargeWeights, Storage>(plan, operands, result);
    }
  }
  launch_weight_gradient<Math, SmallWeights, Storage>(plan, operands, result);
}

// The rows of the output's gradient: groups padded to whole units.
template <typename Math, typename Storage>
Operands make_operands(const ConvPlan& plan, const ConvArguments& a, const Tensor& grad_output) {
  using Column = typename Math::Column;
  const ConvProblem& p = plan.problem;
  Operands operands;
  operands.row_out = static_cast<int32_t>(ceil_div(p.group_out, Math::kUnit) * Math::kUnit);
  operands.grad =
      as_rows<Storage, Column>(grad_output, static_cast<int64_t>(p.groups) * operands.row_out,
                               Cells{p.group_out, operands.row_out});
  operands.input = as_rows<Storage, Column>(a.input, p.channels, plan.cells);
  operands.offset = torch::stable::contiguous(a.offset);
  operands.mask = torch::stable::contiguous(a.mask ? *a.mask : a.offset);
  operands.offset_at = coordinates(operands.offset);
  operands.mask_at = a.mask ? coordinates(operands.mask) : Coordinates{nullptr, ScalarType::Float};
  return operands;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_output, Tensor input, Tensor offset, std::optional<Tensor> mask, Tensor weight,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    std::vector<bool> output_mask, bool allow_tf32, bool deterministic) {
  const ConvArguments arguments{input, offset, mask, weight, stride, padding, dilation};
  const ConvPlan plan = make_plan(arguments, allow_tf32);
  const ConvProblem& p = plan.problem;
  check_floating("grad_output", grad_output, {p.images, p.out_channels, p.out_height, p.out_width},
                 input);
  D2DET_CHECK(grad_output.scalar_type() == plan.type, "grad_output must have the dtype of input");
  D2DET_CHECK(output_mask.size() == 4, "output_mask must have 4 entries");
  const Wanted wanted{output_mask[0], output_mask[1], output_mask[2] && mask, output_mask[3]};
  D2DET_DEVICE_GUARD(input);
  const auto result_like = [&](const Tensor& value, bool is_wanted) {
    return is_wanted ? torch::stable::empty_like(value)
                     : torch::stable::new_empty(input, {0}, input.scalar_type());
  };
  Gradients result{result_like(input, wanted.input), result_like(offset, wanted.offset),
                   result_like(mask ? *mask : input, wanted.mask),
                   result_like(weight, wanted.weight)};
  if (p.pixels == 0) {
    if (wanted.weight) torch::stable::zero_(result.weight);
  } else {
    with_types(plan, [&](auto types) {
      using Math = typename decltype(types)::Math;
      using Storage = typename decltype(types)::Storage;
      const Operands operands = make_operands<Math, Storage>(plan, arguments, grad_output);
      if (wanted.input || wanted.offset || wanted.mask) {
        run_samples<Math, Storage>(plan, arguments, operands, wanted, deterministic, result);
      }
      if (wanted.weight) run_weights<Math, Storage>(plan, operands, result.weight);
    });
  }
  return {result.input, result.offset, result.mask, result.weight};
}

}  // namespace

D2DET_CUDA_LIBRARY_IMPL(m) { m.impl("modulated_deform_conv2d_backward", TORCH_BOX(&backward)); }

}  // namespace d2det
