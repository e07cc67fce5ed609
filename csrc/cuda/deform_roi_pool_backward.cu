// Deformable RoI pooling on CUDA, backward: one launch over all levels. A bin's gradients of offset
// and modulation are sums over its channels, taken by one group of threads in a fixed order. The
// features' gradient is scattered with atomic adds, into float32 or, in deterministic mode, into
// 64-bit fixed point.

#include "deform_roi_pool.cuh"
#include "fixed_point.cuh"

namespace d2det {
namespace {

using namespace roi_pool;

enum class Scatter {
  kNone,
  kAtomic,  // into the accumulation type
  kFixed,   // into 64-bit integers
};

template <typename A>
struct Gradients {
  A* offset;      // (R, 2, o, o) or null
  A* modulation;  // (R, o, o) or null
  // For Scatter::kFixed: magnitudes of the gradient and the modulation, and whether this is the
  // second pass, which marks the pixels that a number not finite belongs to.
  Magnitude* magnitudes;
  bool poison;
};

// V numbers to V neighbouring pixels' sums.
template <Scatter kScatter, int V, typename A>
__device__ __forceinline__ void scatter(void* grad, int64_t index, const A* values,
                                        [[maybe_unused]] const FixedPoint& fixed,
                                        [[maybe_unused]] const Gradients<A>& grads) {
  if constexpr (kScatter == Scatter::kAtomic) {
    atomic_add_vector<V>(static_cast<A*>(grad) + index, values);
  } else {
    unsigned long long* sums = static_cast<unsigned long long*>(grad) + index;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const bool finite = fabs(values[k]) <= std::numeric_limits<A>::max();  // NaN fails
      if (grads.poison) {
        if (!finite) FixedPoint::poison(sums + k);
      } else if (finite) {
        fixed.add(sums + k, values[k]);
      } else {
        grads.magnitudes->not_finite = 1;  // whoever writes, writes the same
      }
    }
  }
}

template <typename T, int V, Scatter kScatter>
__global__ void __launch_bounds__(kThreads)
    pool_backward(const __grid_constant__ Levels levels,
                  const __grid_constant__ Arguments<Accumulate<T>> args, const T* grad_output,
                  const __grid_constant__ Gradients<Accumulate<T>> grads) {
  using A = Accumulate<T>;
  if (kScatter == Scatter::kFixed && grads.poison && grads.magnitudes->not_finite == 0) return;
  D2DET_DYNAMIC_SHARED(unsigned char, memory);
  __shared__ A sums[kMaxBins][3];  // of a bin: modulation, y, x
  const Taps<A> table(memory, args.block_bins, args.points);
  const int vectors = blockDim.x;
  const Stage<T, V> stage{
      reinterpret_cast<T*>(memory + taps_bytes<A>(args.block_bins, args.points)),
      args.block_bins | 1, vectors};
  const Place<A> place(levels, args);
  const Level& level = levels.at[place.level];
  fill_taps(table, place, level, args);

  const int64_t area = static_cast<int64_t>(args.side) * args.side;
  const int64_t image =
      static_cast<int64_t>(place.image) * level.height * level.width * args.channels;
  const T* features = static_cast<const T*>(level.features);
  const bool moves = grads.offset != nullptr || grads.modulation != nullptr;
  double bound = 0;
  if constexpr (kScatter == Scatter::kFixed) {
    // The weights of a bin add up to 1 at most, so that it adds at most this to any pixel.
    bound = grads.magnitudes[0].largest() * static_cast<double>(args.rois_count * area);
    if (args.modulation != nullptr) bound *= grads.magnitudes[1].largest();
  }
  const FixedPoint fixed(bound);

  for (int first = 0; first < args.channels; first += vectors * V) {
    if (!args.channels_last) {
      __syncthreads();
      stage.move_all(place, args, first, min(vectors * V, args.channels - first),
                     [&](T& staged, int64_t index) { staged = grad_output[index]; });
      __syncthreads();
    }
    const int channel = first + threadIdx.x * V;
    // The threads of a warp may have different bins and must all get to its sums.
    for (int start = 0; start < place.bins; start += blockDim.y) {
      const int bin = start + threadIdx.y;
      A sum = 0, sum_y = 0, sum_x = 0;
      if (channel < args.channels && bin < place.bins) {
        const int64_t place_in_rois = place.roi * area + place.first_bin + bin;
        A grad[V];
        if (args.channels_last) {
          const Vector<T, V> packed =
              load_constant<V>(grad_output + place_in_rois * args.channels + channel);
#pragma unroll
          for (int k = 0; k < V; ++k) grad[k] = to_float(packed.data[k]);
        } else {
#pragma unroll
          for (int k = 0; k < V; ++k) grad[k] = to_float(stage.at(threadIdx.x, k, bin));
        }
        const A scale = args.modulation != nullptr ? args.modulation[place_in_rois] : A(1);
        const Tap<A>* y = table.of(bin, 0);
        const Tap<A>* x = table.of(bin, 1);
        const int rows = table.count(bin, 0), columns = table.count(bin, 1);
        for (int i = 0; i < rows; ++i) {
          A row = 0, row_slope = 0;
          for (int j = 0; j < columns; ++j) {
            const int64_t pixel = y[i].index + x[j].index;
            const int64_t index = image + pixel * args.channels + channel;
            if (moves) {
              const Vector<T, V> value = load_constant<V>(features + index);
              A product = 0;
#pragma unroll
              for (int k = 0; k < V; ++k) product += grad[k] * to_float(value.data[k]);
              row += x[j].weight * product;
              row_slope += x[j].slope * product;
            }
            if constexpr (kScatter != Scatter::kNone) {
              const A weight = y[i].weight * x[j].weight * scale;
              A owed[V];
#pragma unroll
              for (int k = 0; k < V; ++k) owed[k] = weight * grad[k];
              scatter<kScatter, V>(level.grad, index, owed, fixed, grads);
            }
          }
          sum += y[i].weight * row;
          sum_y += y[i].slope * row;
          sum_x += y[i].weight * row_slope;
        }
      }
      if (moves) {
        for (int lanes = blockDim.x / 2; lanes > 0; lanes /= 2) {
          sum += __shfl_xor_sync(kFullWarp, sum, lanes);
          sum_y += __shfl_xor_sync(kFullWarp, sum_y, lanes);
          sum_x += __shfl_xor_sync(kFullWarp, sum_x, lanes);
        }
        if (threadIdx.x == 0 && bin < place.bins) {  // the same thread for all channels of a bin
          sums[bin][0] = first == 0 ? sum : sums[bin][0] + sum;
          sums[bin][1] = first == 0 ? sum_y : sums[bin][1] + sum_y;
          sums[bin][2] = first == 0 ? sum_x : sums[bin][2] + sum_x;
        }
      }
    }
  }
  if (!moves) return;
  __syncthreads();
  const int bin = threadIdx.y * blockDim.x + threadIdx.x;
  if (bin >= place.bins) return;
  const int64_t in_roi = place.first_bin + bin;
  const A scale = args.modulation != nullptr ? args.modulation[place.roi * area + in_roi] : A(1);
  if (grads.modulation != nullptr) grads.modulation[place.roi * area + in_roi] = sums[bin][0];
  if (grads.offset != nullptr) {
    A* offset = grads.offset + 2 * place.roi * area + in_roi;
    offset[0] = sums[bin][2] * scale * place.x.extent * args.gamma;
    offset[area] = sums[bin][1] * scale * place.y.extent * args.gamma;
  }
}

// From the sums in fixed point, (N, H, W, C), to numbers in the same order.
template <typename A>
__global__ void from_fixed(const unsigned long long* sums, A* values, int64_t count,
                           const Magnitude* magnitudes, bool modulated, int64_t bins) {
  double bound = magnitudes[0].largest() * static_cast<double>(bins);
  if (modulated) bound *= magnitudes[1].largest();
  const FixedPoint fixed(bound);
  D2DET_GRID_STRIDE(i, count) values[i] = static_cast<A>(fixed.value(sums[i]));
}

template <typename T>
void measure(const Tensor& values, Magnitude* magnitude) {
  D2DET_LAUNCH((measure_magnitude<T>), std::min(grid_for(values.numel(), 256), 1024u), 256, 0,
               current_stream(values), values.const_data_ptr<T>(), values.numel(), magnitude);
}

struct Operands {
  std::vector<Tensor> features;  // channels last where they are read
  std::vector<Tensor> sums;      // what is scattered into
  Tensor grad_output;
  Tables tables;
  Tensor magnitudes;  // (2, 2) int64, in deterministic mode
};

template <typename T, int V, Scatter kScatter>
void launch(const Levels& levels, const Arguments<Accumulate<T>>& args, const Operands& operands,
            Gradients<Accumulate<T>> grads) {
  using A = Accumulate<T>;
  const dim3 block = block_shape(args.channels / V);
  const size_t shared =
      taps_bytes<A>(args.block_bins, args.points) + stage_bytes(args, block.x, V * sizeof(T));
  const auto grid = static_cast<unsigned>(args.rois_count * args.block_tiles);
  const cudaStream_t stream = current_stream(operands.grad_output);
  const T* grad_output = operands.grad_output.const_data_ptr<T>();
  if constexpr (kScatter == Scatter::kFixed) {
    grads.magnitudes = static_cast<Magnitude*>(operands.magnitudes.mutable_data_ptr());
    measure<T>(operands.grad_output, grads.magnitudes);
    if (operands.tables.modulation.defined()) {
      measure<A>(operands.tables.modulation, grads.magnitudes + 1);
    }
  }
  D2DET_LAUNCH((pool_backward<T, V, kScatter>), grid, block, shared, stream, levels, args,
               grad_output, grads);
  if constexpr (kScatter == Scatter::kFixed) {
    grads.poison = true;
    grads.offset = grads.modulation = nullptr;
    D2DET_LAUNCH((pool_backward<T, V, kScatter>), grid, block, shared, stream, levels, args,
                 grad_output, grads);
  }
}

template <typename T, int V>
void launch(const Levels& levels, const Arguments<Accumulate<T>>& args, const Operands& operands,
            const Gradients<Accumulate<T>>& grads, bool deterministic) {
  if (operands.sums.empty()) {
    launch<T, V, Scatter::kNone>(levels, args, operands, grads);
  } else if (deterministic) {
    launch<T, V, Scatter::kFixed>(levels, args, operands, grads);
  } else {
    launch<T, V, Scatter::kAtomic>(levels, args, operands, grads);
  }
}

// A tensor of the shape of `features`, channels last: one like it where that will do.
Tensor empty_channels_last(const Tensor& features, ScalarType type) {
  if (features.scalar_type() == type && is_channels_last(features)) {
    return torch::stable::empty_like(features);
  }
  const auto sizes = features.sizes();
  return torch::stable::empty(std::vector<int64_t>(sizes.begin(), sizes.end()), type, std::nullopt,
                              features.device(), std::nullopt, MemoryFormat::ChannelsLast);
}

// The sums as the gradient of `features`, in its dtype and memory format.
template <typename A>
Tensor finish(const Tensor& features, const Tensor& sums, const Operands& operands, int64_t bins) {
  Tensor values = sums;
  if (sums.scalar_type() == ScalarType::Long) {
    values = empty_channels_last(features, sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float);
    D2DET_LAUNCH((from_fixed<A>), grid_for(values.numel(), 256), 256, 0, current_stream(features),
                 static_cast<const unsigned long long*>(sums.const_data_ptr()),
                 values.mutable_data_ptr<A>(), values.numel(),
                 static_cast<const Magnitude*>(operands.magnitudes.const_data_ptr()),
                 operands.tables.modulation.defined(), bins);
  }
  if (values.scalar_type() == features.scalar_type() && is_channels_last(features)) return values;
  Tensor grad = torch::stable::empty_like(features);
  torch::stable::copy_(grad, values);
  return grad;
}

// A tensor for a gradient in the accumulation type, contiguous.
Tensor make_grad(const std::optional<Tensor>& value, bool needed, ScalarType type) {
  if (!needed || !value) return Tensor();
  const auto sizes = value->sizes();
  return torch::stable::empty(std::vector<int64_t>(sizes.begin(), sizes.end()), type, std::nullopt,
                              value->device());
}

Tensor finish_grad(const std::optional<Tensor>& value, const Tensor& grad, const Tensor& rois) {
  if (!grad.defined()) return torch::stable::new_empty(rois, {0});
  Tensor result = torch::stable::empty_like(*value);
  if (result.scalar_type() == grad.scalar_type() && result.is_contiguous()) return grad;
  torch::stable::copy_(result, grad);
  return result;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> deform_roi_pool_backward(
    const Tensor& grad_output, const std::vector<Tensor>& features, const Tensor& rois,
    const Tensor& levels, const std::optional<Tensor>& offset,
    const std::optional<Tensor>& modulation, int64_t output_size,
    const std::vector<double>& spatial_scales, int64_t sampling_ratio, double gamma,
    std::string convention, std::vector<bool> output_mask, bool deterministic) {
  check_arguments(features, rois, levels, offset, modulation, output_size, spatial_scales,
                  sampling_ratio);
  const Tensor& first = features[0];
  check_floating("grad_output", grad_output,
                 {rois.size(0), first.size(1), output_size, output_size}, first);
  D2DET_CHECK(output_mask.size() == 3, "output_mask must have 3 entries");
  D2DET_DEVICE_GUARD(first);
  const ScalarType type = accumulation_type(first.scalar_type());
  Tensor grad_offset = make_grad(offset, output_mask[1], type);
  Tensor grad_modulation = make_grad(modulation, output_mask[2], type);
  const bool moves = grad_offset.defined() || grad_modulation.defined();

  Operands operands;
  if (output_mask[0]) {
    const ScalarType sum_type = deterministic ? ScalarType::Long : type;
    for (const Tensor& f : features) {
      operands.sums.push_back(empty_channels_last(f, sum_type));
      torch::stable::zero_(operands.sums.back());
    }
  }
  const int64_t bins = grad_output.numel() == 0 ? 0 : rois.size(0) * output_size * output_size;
  if (bins > 0 && first.size(0) > 0 && (moves || output_mask[0])) {
    operands.features = features;
    Levels table{};
    for (size_t i = 0; i < features.size(); ++i) {
      if (moves && !is_channels_last(features[i])) {
        operands.features[i] = torch::stable::contiguous(features[i], MemoryFormat::ChannelsLast);
      }
      table.at[i] = {moves ? operands.features[i].const_data_ptr() : nullptr,
                     output_mask[0] ? operands.sums[i].mutable_data_ptr() : nullptr,
                     static_cast<int32_t>(features[i].size(2)),
                     static_cast<int32_t>(features[i].size(3)), spatial_scales[i]};
    }
    const bool grad_channels_last = is_channels_last(grad_output) && !grad_output.is_contiguous();
    operands.grad_output =
        as(grad_output, first.scalar_type(),
           grad_channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    operands.tables = make_tables(type, rois, levels, offset, modulation);
    if (deterministic) operands.magnitudes = torch::stable::new_zeros(levels, {2, 2});
    dispatch_floating(first.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using A = Accumulate<T>;
      constexpr int V = kVectorSize<T>;
      const Arguments<A> args =
          make_arguments<A>(features, operands.tables, output_size, sampling_ratio, gamma,
                            convention, grad_channels_last);
      const Gradients<A> grads{
          grad_offset.defined() ? grad_offset.mutable_data_ptr<A>() : nullptr,
          grad_modulation.defined() ? grad_modulation.mutable_data_ptr<A>() : nullptr, nullptr,
          false};
      const bool aligned = (!moves || all_aligned(operands.features)) &&
                           aligned16(operands.grad_output.const_data_ptr());
      if (first.size(1) % V == 0 && aligned) {
        launch<T, V>(table, args, operands, grads, deterministic);
      } else {
        launch<T, 1>(table, args, operands, grads, deterministic);
      }
    });
  } else {
    for (Tensor* grad : {&grad_offset, &grad_modulation}) {
      // No channel: nothing depends on them. No image: as in the forward pass.
      if (grad->defined()) torch::stable::fill_(*grad, bins > 0 ? std::nan("") : 0.0);
    }
    if (deterministic) operands.magnitudes = torch::stable::new_zeros(levels, {2, 2});
  }
  std::vector<Tensor> grad_features;
  for (size_t i = 0; i < operands.sums.size(); ++i) {
    grad_features.push_back(type == ScalarType::Double
                                ? finish<double>(features[i], operands.sums[i], operands, bins)
                                : finish<float>(features[i], operands.sums[i], operands, bins));
  }
  return {grad_features, finish_grad(offset, grad_offset, rois),
          finish_grad(modulation, grad_modulation, rois)};
}

}  // namespace

D2DET_CUDA_LIBRARY_IMPL(m) {
  m.impl("deform_roi_pool_backward", TORCH_BOX(&deform_roi_pool_backward));
}

}  // namespace d2det
