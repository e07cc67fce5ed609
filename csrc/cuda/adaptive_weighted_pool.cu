// Adaptive weighted pooling on CUDA, forward: one read of features and logits, one write.

#include "adaptive_weighted_pool_windows.cuh"

namespace d2det {
namespace weighted_pool {

Operands check_and_arrange(const Tensor& features, const Tensor& logits, const Settings& settings) {
  const Window& window = settings.window;
  check_floating("features", features, {-1, -1, -1, -1}, features);
  const auto sizes = features.sizes();
  check_floating("logits", logits, std::vector<int64_t>(sizes.begin(), sizes.end()), features);
  D2DET_CHECK(std::min(sizes[2], sizes[3]) + 2 * window.padding >= window.kernel_size,
              "features of shape ", shape_text(features), " are smaller than a window of ",
              window.kernel_size);
  D2DET_CHECK(sizes[2] * sizes[3] < (int64_t{1} << 31),
              "planes are too large: ", shape_text(features));
  Operands operands;
  operands.channels_last = is_channels_last(features) && !features.is_contiguous();
  const MemoryFormat format =
      operands.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  operands.features = torch::stable::contiguous(features, format);
  // Float32 logits beside half-precision features stay; of all other mixtures it is not worth
  // having kernels.
  ScalarType type = logits.scalar_type();
  const ScalarType own = features.scalar_type();
  const bool half = own == ScalarType::Half || own == ScalarType::BFloat16;
  if (type != own && !(half && type == ScalarType::Float)) type = accumulation_type(own);
  operands.logits = as(logits, type, format);
  return operands;
}

Shape make_shape(const Operands& operands, const Settings& settings, size_t element_bytes,
                 size_t pooled_bytes) {
  const Tensor& features = operands.features;
  const Window& window = settings.window;
  Shape shape{};
  shape.planes = features.size(0) * features.size(1);
  shape.channels = static_cast<int32_t>(features.size(1));
  shape.height = static_cast<int32_t>(features.size(2));
  shape.width = static_cast<int32_t>(features.size(3));
  const auto pooled = [&](int32_t size) {
    return (size + 2 * window.padding - window.kernel_size) / window.stride + 1;
  };
  shape.pooled_height = pooled(shape.height);
  shape.pooled_width = pooled(shape.width);
  const size_t plane_bytes = shape.area() * element_bytes + shape.pooled_area() * pooled_bytes;
  const auto fits = [&](int32_t planes) { return planes * plane_bytes <= kSharedBytesByDefault; };
  // Eight channels are the least that channels-last memory is read well with. Half of the shared
  // memory that may be had without asking lets several blocks share a multiprocessor.
  const int32_t least = operands.channels_last ? 8 : 1;
  if (shape.area() < (1 << 14) && fits(least)) {
    shape.tile = least;
    while (shape.tile < 32 && fits(4 * shape.tile)) shape.tile *= 2;
  }
  const int32_t vector = 4;
  shape.vectors = aligned16(features.const_data_ptr()) &&
                  aligned16(operands.logits.const_data_ptr()) &&
                  (operands.channels_last ? shape.channels % vector == 0
                                          : shape.tile * shape.area() % vector == 0);
  shape.roi_tiles =
      shape.tile == 0 ? 0 : static_cast<int32_t>(ceil_div(shape.channels, shape.tile));
  shape.by_tile = Divisor::of(std::max(shape.tile, 1));
  shape.by_area = Divisor::of(shape.area());
  shape.by_width = Divisor::of(shape.width);
  shape.by_pooled_area = Divisor::of(shape.pooled_area());
  shape.by_pooled_width = Divisor::of(shape.pooled_width);
  return shape;
}

}  // namespace weighted_pool

namespace {

using namespace weighted_pool;

template <typename T, typename L, bool kChannelsLast, int kKernel, int kStride, int kPadding>
__global__ void __launch_bounds__(kThreads)
    pool_tiles(const __grid_constant__ Shape shape, const __grid_constant__ Settings settings,
               const T* features, const L* logits, T* output) {
  using A = Accumulate<T>;
  D2DET_DYNAMIC_SHARED(Pair<A>, pairs);
  const Window window = known<kKernel, kStride, kPadding>(settings.window);
  const A coefficient = static_cast<A>(settings.coefficient);
  const Tile<kChannelsLast> tile(shape);
  read_tile(shape, tile, features, logits, [&](int32_t item, A feature, A logit) {
    pairs[item] = {feature, weight_of<T>(logit, coefficient, settings.normalize).value};
  });
  __syncthreads();
  const A share = A(1) / A(window.kernel_size * window.kernel_size);
  const int32_t area = shape.pooled_area();
  for (int32_t item = threadIdx.x; item < shape.tile * area; item += blockDim.x) {
    const int64_t index = tile.index(shape, item, area);
    if (index < 0) continue;
    const Position at =
        position_in<kChannelsLast>(shape, item, area, shape.by_pooled_area, shape.by_pooled_width);
    const Sums<A> sums = window_sums<kChannelsLast>(shape, pairs, at, window);
    output[index] =
        from_float<T>(settings.normalize ? sums.features / sums.weights : sums.features * share);
  }
}

// Any size of plane: a thread for each window.
template <typename T, typename L>
__global__ void pool_windows(const __grid_constant__ Shape shape,
                             const __grid_constant__ Settings settings, const T* features,
                             const L* logits, T* output, bool channels_last) {
  using A = Accumulate<T>;
  const int32_t size = settings.window.kernel_size;
  D2DET_GRID_STRIDE(item, shape.planes * shape.pooled_area()) {
    const Spot spot(item, shape.pooled_height, shape.pooled_width, shape.channels, channels_last);
    const Sums<A> sums = sums_of_window(shape, settings, spot, features, logits, channels_last);
    output[item] = from_float<T>(settings.normalize ? sums.features / sums.weights
                                                    : sums.features / (A(size) * A(size)));
  }
}

Tensor adaptive_weighted_pool(const Tensor& features, const Tensor& logits, double coefficient,
                              int64_t kernel_size, int64_t stride, int64_t padding,
                              bool normalize) {
  const Settings settings = make_settings(coefficient, kernel_size, stride, padding, normalize);
  D2DET_DEVICE_GUARD(features);
  const Operands operands = check_and_arrange(features, logits, settings);
  const cudaStream_t stream = current_stream(features);
  const size_t pair_bytes = 2 * (features.scalar_type() == ScalarType::Double ? 8 : 4);
  const Shape shape = make_shape(operands, settings, pair_bytes, 0);
  Tensor output = new_output(
      features, {features.size(0), features.size(1), shape.pooled_height, shape.pooled_width});
  if (output.numel() == 0) return output;
  dispatch_operands(operands, [&](auto element, auto logit) {
    using T = decltype(element);
    using L = decltype(logit);
    const T* values = operands.features.const_data_ptr<T>();
    const L* raw = operands.logits.const_data_ptr<L>();
    if (shape.tile == 0) {
      D2DET_LAUNCH((pool_windows<T, L>), grid_for(output.numel(), kThreads), kThreads, 0, stream,
                   shape, settings, values, raw, output.mutable_data_ptr<T>(),
                   operands.channels_last);
      return;
    }
    dispatch_window(operands.channels_last, settings.window,
                    [&](auto layout, auto size, auto step, auto border) {
                      constexpr bool kLast = decltype(layout)::value;
                      constexpr int kSize = decltype(size)::value;
                      constexpr int kStep = decltype(step)::value;
                      constexpr int kBorder = decltype(border)::value;
                      D2DET_LAUNCH((pool_tiles<T, L, kLast, kSize, kStep, kBorder>),
                                   tile_count(shape, operands), kThreads,
                                   tile_bytes(shape, pair_bytes, 0), stream, shape, settings,
                                   values, raw, output.mutable_data_ptr<T>());
                    });
  });
  return output;
}

}  // namespace

D2DET_CUDA_LIBRARY_IMPL(m) { m.impl("adaptive_weighted_pool", TORCH_BOX(&adaptive_weighted_pool)); }

}  // namespace d2det
