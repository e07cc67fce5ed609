// The backward of deformable convolution on CPU. Each unit of work owns a block of input channels
// and a range of output pixels: blocks write to different places, and only where there are more
// threads than blocks do ranges of pixels get copies of what they share, added in a fixed order.

#include "deform_conv_setup.h"

namespace d2det {
namespace {

// Bytes that the columns of a block and the gradient of the output may take for one tile: they are
// to stay in the second-level cache.
constexpr int64_t kTileBytes = 400 << 10;
// Channels in a block: their weights of one tap, and the gradient of these, stay there too.
constexpr int64_t kBlockChannels = 128;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the work is split. A range is some whole images, or one of `bands` parts of an image.
struct Split {
  int64_t blocks, ranges, bands;
};

// Copies of the input's gradient that bands may make; they stay smaller than an im2col buffer.
constexpr int64_t kMostBands = 8;

Split split_work(int64_t threads, int64_t panels, int64_t images) {
  Split best{1, 1, 1};
  double least = 2;  // the largest unit's share of the work
  for (int64_t blocks = std::min(threads, panels); blocks >= 1; --blocks) {
    const int64_t wanted = threads / blocks;
    Split split{blocks, std::min(wanted, images), 1};
    if (wanted >= 2 * images) {
      split.bands = std::min(wanted / images, kMostBands);
      split.ranges = images * split.bands;
    }
    const double images_share =
        double(divide_up(images, split.ranges / split.bands)) / images / split.bands;
    const double share = double(divide_up(panels, blocks)) / panels * images_share;
    if (share < least * 0.99) best = split, least = share;
  }
  return best;
}

// A gradient in T that ends in a tensor like `given`: in its memory where that fits.
template <typename T>
struct Target {
  Tensor result;  // what is returned
  Tensor values;  // contiguous, T

  Target(const Tensor& given, bool needed)
      : result(needed ? torch::stable::empty_like(given) : torch::stable::new_empty(given, {0})),
        values(needed && !direct() ? torch::stable::empty(given.sizes(), kScalar<T>) : result) {}

  bool direct() const { return result.scalar_type() == kScalar<T> && result.is_contiguous(); }
  T* data() const { return values.mutable_data_ptr<T>(); }
  Tensor finish() {
    if (direct()) return result;
    if (result.scalar_type() == kScalar<T> && is_channels_last(result)) {
      copy_to_channels_last<T>(values, result);
    } else {
      torch::stable::copy_(result, values);
    }
    return result;
  }
};

template <typename T>
struct Backward {
  const ConvShape& shape;
  ConvTensors<T> tensors;
  Images grad_output;
  const T* weight;
  bool need_input, need_offset, need_mask, need_weight;
  int64_t taps, all;
  Split split;
  int64_t in_row, out_row;

  int64_t packed_gradient_size() const {
    const ConvProblem<T>& p = tensors.problem;
    return taps * p.in.count * p.out.starts[1] * out_row * in_row;
  }
  int64_t taps_size() const { return 3 * shape.offset_groups * taps * all; }

  void run(T* grad_rows, T* grad_taps, T* grad_packed);
  void reduce_taps(const T* grad_taps, T* grad_offset, T* grad_mask) const;
};

template <typename T>
void Backward<T>::run(T* grad_rows, T* grad_taps, T* grad_packed) {
  ConvProblem<T>& problem = tensors.problem;
  const ConvTraits traits = D2DET_SELECT_ISA(conv_traits<T>)();
  const int64_t outs = shape.out_channels / shape.groups;
  const bool products = grad_rows || grad_taps;
  const int64_t panels = problem.in.count;
  const Memory packed(products ? taps * panels * outs * in_row * sizeof(T) : 0);
  problem.packed = packed.data();
  if (products) {
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      D2DET_SELECT_ISA(pack_for_backward<T>)
      (problem, weight, begin, end, reinterpret_cast<T*>(packed.data()));
    });
  }

  const int64_t column_width = divide_up(panels, split.blocks) * in_row;
  const int64_t grad_width = problem.out.count * out_row;
  const int64_t pixels = shape.out_height * shape.out_width;
  const int64_t fitting = std::max<int64_t>(
      kTileBytes / ((column_width + grad_width) * static_cast<int64_t>(sizeof(T))), traits.rows);
  const int64_t longest = split.bands > 1 ? divide_up(pixels, split.bands)
                                          : divide_up(shape.images, split.ranges) * pixels;
  const int64_t tiles = divide_up(longest, fitting);
  problem.tile = divide_up(divide_up(longest, tiles), traits.rows) * traits.rows;
  const int64_t bytes =
      problem.tile * ((column_width + 2 * grad_width + 12) * sizeof(T) + 16) + 1024;

  const int64_t units = split.blocks * split.ranges;
  torch::stable::parallel_for(0, units, 1, [&](int64_t first, int64_t last) {
    const Memory scratch(bytes);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t block = unit % split.blocks, range = unit / split.blocks;
      const int64_t band = range % split.bands, share = range / split.bands;
      const int64_t shares = split.ranges / split.bands;
      ConvBackward<T> pass{};
      pass.problem = problem;
      pass.grad_output = grad_output;
      pass.panel_begin = panels * block / split.blocks;
      pass.panel_end = panels * (block + 1) / split.blocks;
      const int64_t first_image = shape.images * share / shares;
      const int64_t end_image = shape.images * (share + 1) / shares;
      pass.pixel_begin = first_image * pixels + pixels * band / split.bands;
      pass.pixel_end = (end_image - 1) * pixels + pixels * (band + 1) / split.bands;
      const int64_t input_size = shape.images * shape.channels * shape.height * shape.width;
      if (grad_rows) pass.grad_rows = grad_rows + band * input_size;
      if (grad_taps) pass.grad_taps = grad_taps + block * taps_size();
      if (grad_packed) pass.grad_packed = grad_packed + range * packed_gradient_size();
      D2DET_SELECT_ISA(deform_conv_backward<T>)(pass, scratch.data());
    }
  });
}

// Sums what the blocks of channels give to the gradients of offset and mask.
template <typename T>
void Backward<T>::reduce_taps(const T* grad_taps, T* grad_offset, T* grad_mask) const {
  const ConvProblem<T>& problem = tensors.problem;
  const int64_t pixels = shape.out_height * shape.out_width, panels = problem.in.count;
  const int64_t planes = shape.images * shape.offset_groups * taps;
  torch::stable::parallel_for(0, planes, 8, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t group = plane / taps % shape.offset_groups;
      for (int kind = 0; kind < 3; ++kind) {
        T* to = kind == 2 ? grad_mask : grad_offset;
        if (!to) continue;
        to += (kind == 2 ? plane : 2 * plane + kind) * pixels;
        bool started = false;
        for (int64_t block = 0; block < split.blocks; ++block) {
          const int64_t first = panels * block / split.blocks;
          const int64_t last = panels * (block + 1) / split.blocks - 1;
          if (problem.in.items[first].offset_group > group ||
              problem.in.items[last].offset_group < group) {
            continue;
          }
          const T* from = grad_taps + block * taps_size() + (kind * planes + plane) * pixels;
          if (started) {
            for (int64_t i = 0; i < pixels; ++i) to[i] += from[i];
          } else {
            std::copy(from, from + pixels, to);
          }
          started = true;
        }
      }
    }
  });
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const ConvShape& s, const Tensor& grad_output,
                                                    const Tensor& input, const Tensor& offset,
                                                    const std::optional<Tensor>& mask,
                                                    const Tensor& weight,
                                                    const std::vector<bool>& needed) {
  const bool need_mask = needed[2] && mask;
  Target<T> offset_target(offset, needed[1]);
  Target<T> mask_target(need_mask ? *mask : input, need_mask);
  Target<T> weight_target(weight, needed[3]);
  Tensor grad_input =
      needed[0] ? torch::stable::empty_like(input) : torch::stable::new_empty(input, {0});
  if (s.images == 0) {
    if (needed[3]) torch::stable::zero_(weight_target.values);
    return {grad_input, offset_target.finish(), mask_target.finish(), weight_target.finish()};
  }
  const ConvTraits traits = D2DET_SELECT_ISA(conv_traits<T>)();
  const Tensor grad = as_images(grad_output);
  const Tensor given_weight = contiguous_in<T>(weight);
  const int64_t threads = torch::stable::get_num_threads();
  Backward<T> pass{s, ConvTensors<T>(s, input, offset, mask), images(grad)};
  pass.weight = given_weight.const_data_ptr<T>();
  pass.taps = s.kernel_y * s.kernel_x;
  pass.all = s.images * s.out_height * s.out_width;
  const ConvProblem<T>& problem = pass.tensors.problem;
  pass.split = split_work(threads, problem.in.count, s.images);
  const int64_t block_panels = divide_up(problem.in.count, pass.split.blocks);
  const int64_t parts = divide_up(block_panels * problem.in.vectors * traits.lanes, kBlockChannels);
  pass.split.blocks = std::min(pass.split.blocks * parts, problem.in.count);
  pass.in_row = problem.in.vectors * traits.lanes;
  pass.out_row = problem.out.vectors * traits.lanes;
  const auto scratch = [&](int64_t size, bool wanted) {
    return torch::stable::empty({wanted ? size : 0}, kScalar<T>);
  };

  const int64_t input_size = input.numel(), copies = pass.split.bands;
  const bool rows_direct = needed[0] && copies == 1 && grad_input.scalar_type() == kScalar<T> &&
                           is_channels_last(grad_input);
  const Tensor rows = rows_direct ? grad_input : scratch(copies * input_size, needed[0]);
  const bool need_taps = needed[1] || need_mask;
  const Tensor tap_parts = scratch(pass.split.blocks * pass.taps_size(), need_taps);
  const Tensor packed = scratch(pass.split.ranges * pass.packed_gradient_size(), needed[3]);
  use_large_pages(rows);
  use_large_pages(tap_parts);
  T* grad_rows = needed[0] ? rows.mutable_data_ptr<T>() : nullptr;
  pass.run(grad_rows, need_taps ? tap_parts.mutable_data_ptr<T>() : nullptr,
           needed[3] ? packed.mutable_data_ptr<T>() : nullptr);

  if (need_taps) {
    pass.reduce_taps(tap_parts.const_data_ptr<T>(), needed[1] ? offset_target.data() : nullptr,
                     need_mask ? mask_target.data() : nullptr);
  }
  if (needed[3]) {
    torch::stable::parallel_for(0, problem.in.count, 1, [&](int64_t begin, int64_t end) {
      D2DET_SELECT_ISA(unpack_weight_gradient<T>)
      (problem, packed.mutable_data_ptr<T>(), pass.split.ranges, begin, end, weight_target.data());
    });
  }
  if (needed[0] && !rows_direct) {
    const bool images_fit = grad_input.is_contiguous() || is_channels_last(grad_input);
    Tensor target = images_fit ? grad_input : torch::stable::contiguous(grad_input);
    const int64_t pixels = s.height * s.width, total = s.images * pixels;
    const Images to = images(target);
    torch::stable::parallel_for(0, divide_up(total, 16), 32, [&](int64_t begin, int64_t end) {
      begin *= 16, end = std::min(end * 16, total);
      D2DET_SELECT_ISA(add_copies<T>)
      (grad_rows, input_size, copies, begin * s.channels, end * s.channels);
      for (int64_t part = begin; part < end; part += 256) {
        D2DET_SELECT_ISA(rows_to_images<T>)
        (grad_rows, s.channels, pixels, part, std::min(part + 256, end), to);
      }
    });
    if (!images_fit) torch::stable::copy_(grad_input, target);
  }
  return {grad_input, offset_target.finish(), mask_target.finish(), weight_target.finish()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> modulated_deform_conv2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset,
    const std::optional<Tensor>& mask, const Tensor& weight, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, std::vector<bool> output_mask,
    bool /*allow_tf32*/, bool /*deterministic: it always is*/) {
  const ConvShape s = conv_shape(input, offset, mask, weight, stride, padding, dilation);
  check_floating("grad_output", grad_output, {s.images, s.out_channels, s.out_height, s.out_width},
                 input);
  D2DET_CHECK(output_mask.size() == 4, "output_mask must have 4 elements");
  const auto run = input.scalar_type() == ScalarType::Double ? &backward<double> : &backward<float>;
  return run(s, grad_output, input, offset, mask, weight, output_mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2det, CPU, m) {
  m.impl("modulated_deform_conv2d_backward", TORCH_BOX(&modulated_deform_conv2d_backward));
}

}  // namespace d2det
