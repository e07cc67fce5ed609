// Adaptive weighted pooling on CUDA, backward. The weights are computed again. With S the sum of
// weights of a window, y its result and g its gradient, a pixel's share of the windows that cover
// it is A = sum g / S and B = sum g y / S; then df = w A and dw = f A - B. Each pixel gathers from
// its windows: no atomics.

#include "adaptive_weighted_pool_windows.cuh"

namespace d2det {
namespace {

using namespace weighted_pool;

// What a window gives to each of its pixels: g / S and g y / S, or g / area and 0.
template <typename A>
struct alignas(2 * sizeof(A)) Owed {
  A plain, weighted;
};

template <typename A>
__device__ __forceinline__ Owed<A> owed_by(A grad, Sums<A> sums, const Settings& settings) {
  const A size = static_cast<A>(settings.window.kernel_size);
  if (!settings.normalize) return {grad / (size * size), A(0)};
  const A share = grad / sums.weights;
  return {share, share * (sums.features / sums.weights)};
}

template <typename T, typename L, bool kChannelsLast, int kKernel, int kStride, int kPadding>
__global__ void __launch_bounds__(kThreads)
    pool_tiles_backward(const __grid_constant__ Shape shape,
                        const __grid_constant__ Settings settings, const T* grad_output,
                        const T* features, const L* logits, T* grad_features, L* grad_logits) {
  using A = Accumulate<T>;
  D2DET_DYNAMIC_SHARED(Pair<A>, pairs);
  const int32_t elements = shape.tile * shape.area(), pooled = shape.tile * shape.pooled_area();
  Owed<A>* const owed = reinterpret_cast<Owed<A>*>(pairs + elements);
  A* const slopes = reinterpret_cast<A*>(owed + pooled);
  const Window window = known<kKernel, kStride, kPadding>(settings.window);
  const A coefficient = static_cast<A>(settings.coefficient);
  const Tile<kChannelsLast> tile(shape);
  read_tile(shape, tile, features, logits, [&](int32_t item, A feature, A logit) {
    const Weight<A> weight = weight_of<T>(logit, coefficient, settings.normalize);
    pairs[item] = {feature, weight.value};
    slopes[item] = weight.slope;
  });
  __syncthreads();
  for (int32_t item = threadIdx.x; item < pooled; item += blockDim.x) {
    const int64_t index = tile.index(shape, item, shape.pooled_area());
    if (index < 0) continue;
    const Position at = position_in<kChannelsLast>(shape, item, shape.pooled_area(),
                                                   shape.by_pooled_area, shape.by_pooled_width);
    const Sums<A> sums = window_sums<kChannelsLast>(shape, pairs, at, window);
    owed[item] = owed_by(to_float(grad_output[index]), sums, settings);
  }
  __syncthreads();
  for (int32_t item = threadIdx.x; item < elements; item += blockDim.x) {
    const int64_t index = tile.index(shape, item, shape.area());
    if (index < 0) continue;
    const Position at =
        position_in<kChannelsLast>(shape, item, shape.area(), shape.by_area, shape.by_width);
    const Range rows = covering(at.y, window, shape.pooled_height);
    const Range columns = covering(at.x, window, shape.pooled_width);
    A plain = 0, weighted = 0;
    for (int32_t y = rows.begin; y < rows.end; ++y) {
      for (int32_t x = columns.begin; x < columns.end; ++x) {
        const Owed<A> part = owed[item_of<kChannelsLast>(
            shape, at.plane, y * shape.pooled_width + x, shape.pooled_area())];
        plain += part.plain;
        weighted += part.weighted;
      }
    }
    const Pair<A> pair = pairs[item];
    if (grad_features != nullptr) grad_features[index] = from_float<T>(pair.weight * plain);
    if (grad_logits != nullptr) {
      grad_logits[index] = static_cast<L>(slopes[item] * (pair.feature * plain - weighted));
    }
  }
}

// Any size of plane: first what each window owes, then the pixels.
template <typename T, typename L>
__global__ void find_owed(const __grid_constant__ Shape shape,
                          const __grid_constant__ Settings settings, const T* grad_output,
                          const T* features, const L* logits, Owed<Accumulate<T>>* owed,
                          bool channels_last) {
  D2DET_GRID_STRIDE(item, shape.planes * shape.pooled_area()) {
    const Spot spot(item, shape.pooled_height, shape.pooled_width, shape.channels, channels_last);
    owed[item] =
        owed_by(to_float(grad_output[item]),
                sums_of_window(shape, settings, spot, features, logits, channels_last), settings);
  }
}

template <typename T, typename L>
__global__ void collect_owed(const __grid_constant__ Shape shape,
                             const __grid_constant__ Settings settings,
                             const Owed<Accumulate<T>>* owed, const T* features, const L* logits,
                             T* grad_features, L* grad_logits, bool channels_last) {
  using A = Accumulate<T>;
  D2DET_GRID_STRIDE(item, shape.planes * shape.area()) {
    const Spot spot(item, shape.height, shape.width, shape.channels, channels_last);
    const Range rows = covering(spot.y, settings.window, shape.pooled_height);
    const Range columns = covering(spot.x, settings.window, shape.pooled_width);
    A plain = 0, weighted = 0;
    for (int32_t y = rows.begin; y < rows.end; ++y) {
      for (int32_t x = columns.begin; x < columns.end; ++x) {
        const Owed<A> part = owed[spot.at(y, x, shape.pooled_height, shape.pooled_width,
                                          shape.channels, channels_last)];
        plain += part.plain;
        weighted += part.weighted;
      }
    }
    const Weight<A> weight = weight_of<T>(static_cast<A>(to_float(logits[item])),
                                          static_cast<A>(settings.coefficient), settings.normalize);
    if (grad_features != nullptr) grad_features[item] = from_float<T>(weight.value * plain);
    if (grad_logits != nullptr) {
      grad_logits[item] =
          static_cast<L>(weight.slope * (to_float(features[item]) * plain - weighted));
    }
  }
}

// Where the gradient of `value` is written: a tensor like `arranged`, which the kernels read.
struct Target {
  Tensor result, written;
};

Target make_target(const Tensor& value, const Tensor& arranged, bool needed) {
  if (!needed) return {torch::stable::new_empty(value, {0}), Tensor()};
  Tensor result = torch::stable::empty_like(value);
  const bool same =
      value.scalar_type() == arranged.scalar_type() &&
      std::equal(result.strides().begin(), result.strides().end(), arranged.strides().begin());
  return {result, same ? result : torch::stable::empty_like(arranged)};
}

Tensor finish(Target& target) {
  if (target.written.defined() &&
      target.written.const_data_ptr() != target.result.const_data_ptr()) {
    torch::stable::copy_(target.result, target.written);
  }
  return target.result;
}

template <typename E>
E* pointer(const Target& target) {
  return target.written.defined() ? target.written.mutable_data_ptr<E>() : nullptr;
}

std::tuple<Tensor, Tensor> adaptive_weighted_pool_backward(const Tensor& grad_output,
                                                           const Tensor& features,
                                                           const Tensor& logits, double coefficient,
                                                           int64_t kernel_size, int64_t stride,
                                                           int64_t padding, bool normalize,
                                                           std::vector<bool> output_mask) {
  const Settings settings = make_settings(coefficient, kernel_size, stride, padding, normalize);
  D2DET_CHECK(output_mask.size() == 2, "output_mask must have 2 entries");
  D2DET_DEVICE_GUARD(features);
  const Operands operands = check_and_arrange(features, logits, settings);
  const size_t number_bytes = features.scalar_type() == ScalarType::Double ? 8 : 4;
  const Shape shape = make_shape(operands, settings, 3 * number_bytes, 2 * number_bytes);
  check_floating("grad_output", grad_output,
                 {features.size(0), features.size(1), shape.pooled_height, shape.pooled_width},
                 features);
  Target for_features = make_target(features, operands.features, output_mask[0]);
  Target for_logits = make_target(logits, operands.logits, output_mask[1]);
  if (features.numel() == 0 || !(output_mask[0] || output_mask[1])) {
    return {for_features.result, for_logits.result};
  }
  const Tensor grad =
      as(grad_output, features.scalar_type(),
         operands.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  const cudaStream_t stream = current_stream(features);
  dispatch_operands(operands, [&](auto element, auto logit) {
    using T = decltype(element);
    using L = decltype(logit);
    using A = Accumulate<T>;
    const T* values = operands.features.const_data_ptr<T>();
    const L* raw = operands.logits.const_data_ptr<L>();
    const T* grads = grad.const_data_ptr<T>();
    T* features_out = pointer<T>(for_features);
    L* logits_out = pointer<L>(for_logits);
    if (shape.tile == 0) {
      const Tensor workspace =
          torch::stable::empty({grad.numel() * 2}, accumulation_type(features.scalar_type()),
                               std::nullopt, features.device());
      auto* owed = static_cast<Owed<A>*>(workspace.mutable_data_ptr());
      D2DET_LAUNCH((find_owed<T, L>), grid_for(grad.numel(), kThreads), kThreads, 0, stream, shape,
                   settings, grads, values, raw, owed, operands.channels_last);
      D2DET_LAUNCH((collect_owed<T, L>), grid_for(features.numel(), kThreads), kThreads, 0, stream,
                   shape, settings, owed, values, raw, features_out, logits_out,
                   operands.channels_last);
      return;
    }
    dispatch_window(operands.channels_last, settings.window,
                    [&](auto layout, auto size, auto step, auto border) {
                      constexpr bool kLast = decltype(layout)::value;
                      constexpr int kSize = decltype(size)::value;
                      constexpr int kStep = decltype(step)::value;
                      constexpr int kBorder = decltype(border)::value;
                      D2DET_LAUNCH((pool_tiles_backward<T, L, kLast, kSize, kStep, kBorder>),
                                   tile_count(shape, operands), kThreads,
                                   tile_bytes(shape, 3 * number_bytes, 2 * number_bytes), stream,
                                   shape, settings, grads, values, raw, features_out, logits_out);
                    });
  });
  return {finish(for_features), finish(for_logits)};
}

}  // namespace

D2DET_CUDA_LIBRARY_IMPL(m) {
  m.impl("adaptive_weighted_pool_backward", TORCH_BOX(&adaptive_weighted_pool_backward));
}

}  // namespace d2det
