// Modulated deformable convolution on a GPU, forward: the choice of a tile and the launches.

#include <cstdlib>

#include "modulated_deform_conv2d_forward.cuh"
#include "modulated_deform_conv2d_plan.cuh"

namespace d2det {
namespace {

struct ForwardChoice {
  int tile;
  int32_t splits;
};

// Cycles that a chunk takes, reckoned from the machine code and not measured: a multiprocessor's
// tensor cores do some 1270 multiply-adds a cycle through mma.sync; gathering a pixel takes 8
// cycles of issue, and feeding the tensor cores the rest. What is shorter hides behind the other
// mostly.
template <typename Tile>
double tile_cost() {
  const double products = 0.050 * Tile::kPixels * Tile::kOutputs;
  const double issue = 8.0 * Tile::kPixels + 0.018 * Tile::kPixels * Tile::kOutputs;
  return std::max(products, issue) + 0.25 * std::min(products, issue) + 100.0;
}

// The least time on the busiest multiprocessor. A split of the taps fills the GPU where there are
// few tiles, and costs a pass over the partial sums.
template <typename Tile>
void consider(const ConvProblem& p, int tile, int multiprocessors, double& best,
              ForwardChoice& choice) {
  const int64_t blocks =
      ceil_div(p.pixels, Tile::kPixels) * ceil_div(p.group_out, Tile::kOutputs) * p.groups;
  for (int32_t splits = 1; splits <= p.taps(); ++splits) {
    if (splits > 1 && blocks * (splits - 1) >= 2 * multiprocessors) break;
    const double rounds = static_cast<double>(ceil_div(blocks * splits, multiprocessors));
    const double taps = static_cast<double>(ceil_div(p.taps(), splits));
    // One block does not hide its own latency.
    const double lonely = rounds < 2 || Tile::kMinBlocks == 1 ? 1.2 : 1.0;
    // Each partial sum is written and read, 4 bytes of some 2 KiB a cycle, at 5000 cycles a launch.
    const double sums =
        splits == 1 ? 0 : 5000.0 + 0.004 * splits * static_cast<double>(p.pixels) * p.out_channels;
    const double chunks = static_cast<double>(ceil_div(p.group_in, 64));
    const double cost = rounds * taps * chunks * lonely * tile_cost<Tile>() + sums;
    if (best < 0 || cost < best) {
      best = cost;
      choice = {tile, splits};
    }
  }
}

template <typename Math, typename Tile, typename Storage>
void launch_forward(const ConvPlan& plan, const Tensor& input, const Coordinates& offset,
                    const Coordinates& mask, const Tensor& weight,
                    const std::optional<Tensor>& bias, int32_t splits, Tensor& output) {
  using Column = typename Math::Column;
  using Sum = typename Math::Sum;
  const ConvProblem& p = plan.problem;
  const cudaStream_t stream = current_stream(input);
  ForwardResult<Storage, Sum> result{};
  result.output = static_cast<Storage*>(output.mutable_data_ptr());
  result.bias = bias ? static_cast<const Storage*>(bias->const_data_ptr()) : nullptr;
  result.channels_last = is_channels_last(output) && !output.is_contiguous();
  std::optional<Tensor> partial;
  const int32_t taps_per_split = static_cast<int32_t>(ceil_div(p.taps(), splits));
  splits = static_cast<int32_t>(ceil_div(p.taps(), taps_per_split));
  if (splits > 1) {
    partial =
        torch::stable::new_empty(output, {splits, p.pixels, p.out_channels}, kScalarType<Sum>);
    result.partial = static_cast<Sum*>(partial->mutable_data_ptr());
  }
  const int64_t pixel_tiles = ceil_div(p.pixels, Tile::kPixels);
  const int64_t output_tiles = ceil_div(p.group_out, Tile::kOutputs);
  D2DET_CHECK(pixel_tiles * output_tiles <= std::numeric_limits<int32_t>::max() &&
                  p.groups <= kMaxGridY && splits <= kMaxGridY,
              "the output of shape ", shape_text(output), " is too large");
  const dim3 grid(static_cast<unsigned>(pixel_tiles * output_tiles),
                  static_cast<unsigned>(p.groups), static_cast<unsigned>(splits));
  constexpr size_t kShared = forward_shared_bytes<Math, Tile, Storage>();
  D2DET_LAUNCH((forward_kernel<Math, Tile, Storage>), grid, Tile::kThreads, kShared, stream, p,
               static_cast<const Column*>(input.const_data_ptr()), offset, mask,
               static_cast<const Column*>(weight.const_data_ptr()), result,
               static_cast<int32_t>(output_tiles), taps_per_split);
  if (splits > 1) {
    D2DET_LAUNCH((sum_splits_kernel<Storage, Sum>), grid_for(p.pixels * p.out_channels, 256), 256,
                 0, stream, p, result, splits);
  }
}

using LargeTile = ForwardTile<128, 128, 2, 4, 2>;
using WideTile = ForwardTile<128, 256, 2, 4, 1>;
using ShortTile = ForwardTile<64, 128, 2, 4, 2>;
using SmallTile = ForwardTile<64, 64, 2, 4, 2>;

template <typename Math, typename Storage>
void run_forward(const ConvPlan& plan, const ConvArguments& a, const std::optional<Tensor>& bias,
                 Tensor& output) {
  const ConvProblem& p = plan.problem;
  const Tensor input = as_rows<Storage, typename Math::Column>(a.input, p.channels, plan.cells);
  const Tensor weight = packed_weights<Math, Storage, false>(plan, a.weight, p.group_out);
  const Tensor offset = torch::stable::contiguous(a.offset);
  const Tensor mask = torch::stable::contiguous(a.mask ? *a.mask : a.offset);
  const Coordinates offset_at = coordinates(offset);
  const Coordinates mask_at = a.mask ? coordinates(mask) : Coordinates{nullptr, ScalarType::Float};
  const auto launch = [&](auto tile, int32_t splits) {
    launch_forward<Math, decltype(tile), Storage>(plan, input, offset_at, mask_at, weight, bias,
                                                  splits, output);
  };
  const int multiprocessors = multiprocessor_count(a.input);
  double best = -1;
  ForwardChoice choice{};
  consider<SmallTile>(p, 0, multiprocessors, best, choice);
  if constexpr (std::is_same_v<Math, ExactMath<typename Math::Sum>>) {
    launch(SmallTile(), choice.splits);
  } else {
    consider<ShortTile>(p, 1, multiprocessors, best, choice);
    consider<LargeTile>(p, 2, multiprocessors, best, choice);
    if (forward_shared_bytes<Math, WideTile, Storage>() <= shared_bytes_limit(a.input)) {
      consider<WideTile>(p, 3, multiprocessors, best, choice);
    }
#if defined(D2DET_EMULATE_CUDA)  // tests try all of them
    if (const char* forced = std::getenv("D2DET_EMULATOR_TILE")) choice.tile = std::atoi(forced);
#endif
    if (choice.tile == 0) return launch(SmallTile(), choice.splits);
    if (choice.tile == 1) return launch(ShortTile(), choice.splits);
    if (choice.tile == 2) return launch(LargeTile(), choice.splits);
    launch(WideTile(), choice.splits);
  }
}

Tensor forward(Tensor input, Tensor offset, std::optional<Tensor> mask, Tensor weight,
               std::optional<Tensor> bias, std::vector<int64_t> stride,
               std::vector<int64_t> padding, std::vector<int64_t> dilation, bool allow_tf32) {
  const ConvArguments arguments{input, offset, mask, weight, stride, padding, dilation};
  const ConvPlan plan = make_plan(arguments, allow_tf32);
  if (bias) {
    check_floating("bias", *bias, {weight.size(0)}, input);
    D2DET_CHECK(bias->scalar_type() == input.scalar_type(), "bias must have the dtype of input");
    bias = torch::stable::contiguous(*bias);
  }
  D2DET_DEVICE_GUARD(input);
  const ConvProblem& p = plan.problem;
  Tensor output = new_output(input, {p.images, p.out_channels, p.out_height, p.out_width});
  if (p.pixels == 0) return output;
  with_types(plan, [&](auto types) {
    using Math = typename decltype(types)::Math;
    using Storage = typename decltype(types)::Storage;
    run_forward<Math, Storage>(plan, arguments, bias, output);
  });
  return output;
}

}  // namespace

D2DET_CUDA_LIBRARY_IMPL(m) { m.impl("modulated_deform_conv2d", TORCH_BOX(&forward)); }

}  // namespace d2det
