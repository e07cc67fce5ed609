// Adaptive weighted pooling on CPU: one fused pass over features and logits, forward and backward.

#include "adaptive_weighted_pool.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "pixels.h"

namespace d2det {
namespace {

// Channels that are worked on in one go: whole vectors of any instruction set.
constexpr int64_t kChannels = 16;

WeightedPool check(const Tensor& features, const Tensor& logits, double coefficient,
                   int64_t kernel_size, int64_t stride, int64_t padding, bool normalize) {
  check_floating("features", features, {-1, -1, -1, -1}, features);
  const std::vector<int64_t> sizes(features.sizes().begin(), features.sizes().end());
  check_floating("logits", logits, sizes, features);
  D2DET_CHECK(kernel_size >= 1 && stride >= 1 && padding >= 0 && 2 * padding <= kernel_size,
              "kernel_size and stride must be at least 1 and padding in [0, kernel_size / 2], got ",
              kernel_size, ", ", stride, ", ", padding);
  const auto pooled = [&](int64_t size) { return (size + 2 * padding - kernel_size) / stride + 1; };
  D2DET_CHECK(std::min(sizes[2], sizes[3]) >= 1 &&
                  std::min(sizes[2], sizes[3]) + 2 * padding >= kernel_size,
              "features of shape ", shape_text(features), " are smaller than a window of ",
              kernel_size, " with padding ", padding);
  return {sizes[2], sizes[3], pooled(sizes[2]), pooled(sizes[3]), kernel_size,
          stride,   padding,  coefficient,      normalize};
}

// float64 features are worked on in float64, all others in float32.
Tensor operand(const Tensor& value, ScalarType accumulation, MemoryFormat format) {
  const bool wide = accumulation == ScalarType::Double || value.scalar_type() == ScalarType::Double;
  return as(value, wide ? accumulation : value.scalar_type(), format);
}

// Calls run(RoI, first channel, channels, scratch) for blocks of channels. In NCHW the planes of
// all RoIs count as the channels of one.
template <typename T, typename Function>
void for_each_block(const WeightedPool& pool, int64_t rois, int64_t channels, MemoryFormat format,
                    const Function& run) {
  if (format == MemoryFormat::Contiguous) {
    channels *= rois;
    rois = std::min<int64_t>(rois, 1);
  }
  const int64_t blocks = (channels + kChannels - 1) / kChannels;
  const int64_t bytes = pool.height * pool.width * kWeightedPoolScratch +
                        pool.pooled_height * pool.pooled_width * kWeightedPoolPooledScratch;
  const int64_t grain = std::max<int64_t>(1, 4096 / (pool.height * pool.width * kChannels));
  torch::stable::parallel_for(0, rois * blocks, grain, [&](int64_t begin, int64_t end) {
    const Scratch<T> scratch(bytes / static_cast<int64_t>(sizeof(T)));
    while (begin < end) {
      const int64_t roi = begin / blocks, first = begin % blocks;
      const int64_t count = std::min(blocks - first, end - begin);
      const int64_t some = std::min(count * kChannels, channels - first * kChannels);
      run(roi, first * kChannels, some, scratch.get());
      begin += count;
    }
  });
}

Pixels from_channel(Pixels value, int64_t channel, int64_t element_size) {
  if (value.data == nullptr) return value;
  value.data = static_cast<char*>(value.data) + channel * value.channel_stride * element_size;
  return value;
}

struct Part {
  const Tensor& tensor;
  MemoryFormat format;
  Pixels operator()(int64_t roi, int64_t channel) const {
    return from_channel(pixels_of(tensor, format, roi), channel,
                        static_cast<int64_t>(tensor.element_size()));
  }
};

template <typename T>
void run_forward(const WeightedPool& pool, const Tensor& features, const Tensor& logits,
                 const Tensor& output, MemoryFormat format) {
  const auto kernel = D2DET_SELECT_ISA(weighted_pool<T>);
  const Part f{features, format}, l{logits, format}, o{output, format};
  for_each_block<T>(pool, features.size(0), features.size(1), format,
                    [&](int64_t roi, int64_t c, int64_t channels, T* scratch) {
                      kernel(pool, f(roi, c), l(roi, c), o(roi, c), channels, scratch);
                    });
}

Tensor adaptive_weighted_pool(const Tensor& features, const Tensor& logits, double coefficient,
                              int64_t kernel_size, int64_t stride, int64_t padding,
                              bool normalize) {
  const WeightedPool pool =
      check(features, logits, coefficient, kernel_size, stride, padding, normalize);
  const ScalarType type = accumulation_type(features.scalar_type());
  const MemoryFormat format = format_of(features);
  const Tensor values = operand(features, type, format), weights = operand(logits, type, format);
  Tensor output = new_output(
      features, {features.size(0), features.size(1), pool.pooled_height, pool.pooled_width});
  use_large_pages(output);
  if (type == ScalarType::Double) {
    run_forward<double>(pool, values, weights, output, format);
  } else {
    run_forward<float>(pool, values, weights, output, format);
  }
  return output;
}

template <typename T>
void run_backward(const WeightedPool& pool, const Tensor& grad_output, const Tensor& features,
                  const Tensor& logits, const Tensor* grad_features, const Tensor* grad_logits,
                  MemoryFormat format) {
  const auto kernel = D2DET_SELECT_ISA(weighted_pool_backward<T>);
  const Part g{grad_output, format}, f{features, format}, l{logits, format};
  const auto wanted = [&](const Tensor* grad, int64_t roi, int64_t c) {
    return grad ? Part{*grad, format}(roi, c) : Pixels{nullptr, Element::kFloat32, 1, 1};
  };
  for_each_block<T>(pool, features.size(0), features.size(1), format,
                    [&](int64_t roi, int64_t c, int64_t channels, T* scratch) {
                      kernel(pool, g(roi, c), f(roi, c), l(roi, c), wanted(grad_features, roi, c),
                             wanted(grad_logits, roi, c), channels, scratch);
                    });
}

std::tuple<Tensor, Tensor> adaptive_weighted_pool_backward(const Tensor& grad_output,
                                                           const Tensor& features,
                                                           const Tensor& logits, double coefficient,
                                                           int64_t kernel_size, int64_t stride,
                                                           int64_t padding, bool normalize,
                                                           std::vector<bool> output_mask) {
  const WeightedPool pool =
      check(features, logits, coefficient, kernel_size, stride, padding, normalize);
  check_floating("grad_output", grad_output,
                 {features.size(0), features.size(1), pool.pooled_height, pool.pooled_width},
                 features);
  D2DET_CHECK(output_mask.size() == 2, "output_mask must have 2 entries");
  const ScalarType type = accumulation_type(features.scalar_type());
  const MemoryFormat format = format_of(features);
  const Tensor grad = operand(grad_output, type, format);
  const Tensor values = operand(features, type, format), weights = operand(logits, type, format);
  std::optional<GradientTensor> grads[2];
  if (output_mask[0]) grads[0].emplace(features, values.scalar_type(), format);
  if (output_mask[1]) grads[1].emplace(logits, weights.scalar_type(), format);
  const Tensor* grad_features = grads[0] ? &grads[0]->work : nullptr;
  const Tensor* grad_logits = grads[1] ? &grads[1]->work : nullptr;
  if (type == ScalarType::Double) {
    run_backward<double>(pool, grad, values, weights, grad_features, grad_logits, format);
  } else {
    run_backward<float>(pool, grad, values, weights, grad_features, grad_logits, format);
  }
  return {grads[0] ? grads[0]->finish() : torch::stable::new_empty(features, {0}),
          grads[1] ? grads[1]->finish() : torch::stable::new_empty(logits, {0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2det, CPU, m) {
  m.impl("adaptive_weighted_pool", TORCH_BOX(&adaptive_weighted_pool));
  m.impl("adaptive_weighted_pool_backward", TORCH_BOX(&adaptive_weighted_pool_backward));
}

}  // namespace d2det
