// Host side of the input's gradient: where it is added up, and how it gets to torch's layout.

#pragma once

#include "modulated_deform_conv2d_grad_samples.cuh"
#include "modulated_deform_conv2d_plan.cuh"

namespace d2det {

// The tensors as the kernels read them.
struct Operands {
  Tensor input, grad, offset, mask;
  Coordinates offset_at, mask_at;
  int32_t row_out;  // channels of one group in the rows of `grad`
};

inline dim3 transpose_grid(int64_t images, int64_t pixels, int64_t channels) {
  return dim3(static_cast<unsigned>(ceil_div(pixels, kTransposeSide)),
              static_cast<unsigned>(ceil_div(channels, kTransposeSide)),
              static_cast<unsigned>(std::min(images, kMaxGridY)));
}

// Rows of sums as a tensor with the strides of `like`.
template <typename Sum, typename Storage>
void store_images(const ConvPlan& plan, const Tensor& rows, Tensor& result) {
  const ConvProblem& p = plan.problem;
  const bool channels_last = is_channels_last(result);
  Tensor target = channels_last || result.is_contiguous()
                      ? result
                      : torch::stable::empty({p.images, plan.input_channels, p.height, p.width},
                                             result.scalar_type(), std::nullopt, result.device());
  const int64_t pixels = static_cast<int64_t>(p.height) * p.width;
  D2DET_LAUNCH((images_from_rows_kernel<Sum, Storage>),
               transpose_grid(p.images, pixels, plan.input_channels),
               kTransposeSide * kTransposeRows, 0, current_stream(rows),
               static_cast<const Sum*>(rows.const_data_ptr()),
               static_cast<Storage*>(target.mutable_data_ptr()), p.images, pixels,
               static_cast<int32_t>(plan.input_channels), p.channels, plan.cells, channels_last);
  if (target.mutable_data_ptr() != result.mutable_data_ptr()) torch::stable::copy_(result, target);
}

// |values| of a dense tensor, for the bound of fixed-point sums; kept by the tensor returned.
template <typename T>
Tensor measure(const Tensor& values) {
  Tensor magnitude = torch::stable::new_zeros(values, {2}, ScalarType::Long);
  D2DET_LAUNCH((measure_magnitude<T>), std::min(grid_for(values.numel(), 256), 1024u), 256, 0,
               current_stream(values), static_cast<const T*>(values.const_data_ptr()),
               values.numel(), static_cast<Magnitude*>(magnitude.mutable_data_ptr()));
  return magnitude;
}

template <typename Storage>
Tensor measure_coordinates(const Tensor& values) {
  return values.scalar_type() == ScalarType::Float ? measure<float>(values)
                                                   : measure<Storage>(values);
}

// Where the input's gradient is added up.
template <typename Math, typename Storage>
class InputSums {
 public:
  using Sum = typename Math::Sum;

  InputSums(const ConvPlan& plan, const Operands& operands, const Tensor& weight, bool masked,
            bool deterministic, Tensor& result)
      : plan_(plan), deterministic_(deterministic), result_(result) {
    const std::vector<int64_t> sizes{plan.unpadded_rows(), plan.problem.channels};
    in_place_ = !deterministic && kScalarType<Sum> == result.scalar_type() && is_rows(result) &&
                plan.problem.channels == plan.input_channels;
    if (in_place_) {
      sums_ = result;
      torch::stable::zero_(sums_);
    } else {
      sums_ = torch::stable::new_zeros(result, sizes,
                                       deterministic ? ScalarType::Long : kScalarType<Sum>);
    }
    if (deterministic) {
      fixed_.units = static_cast<unsigned long long*>(sums_.mutable_data_ptr());
      const auto keep = [&](Tensor magnitude) {
        magnitudes_.push_back(magnitude);
        return static_cast<const Magnitude*>(magnitude.const_data_ptr());
      };
      fixed_.grad = keep(measure<typename Math::Column>(operands.grad));
      fixed_.weight = keep(measure<typename Math::Column>(weight));
      fixed_.offset = keep(measure_coordinates<Storage>(operands.offset));
      if (masked) fixed_.mask = keep(measure_coordinates<Storage>(operands.mask));
    }
  }

  const FixedPointSums& fixed() const { return fixed_; }
  Sum* sums() const { return static_cast<Sum*>(sums_.mutable_data_ptr()); }

  void finish() {
    if (in_place_) return;
    Tensor numbers = sums_;
    if (deterministic_) {
      numbers = torch::stable::new_empty(result_, {sums_.size(0), sums_.size(1)}, kScalarType<Sum>);
      D2DET_LAUNCH((numbers_from_units_kernel<Sum>), grid_for(sums_.numel(), 256), 256, 0,
                   current_stream(result_), plan_.problem, fixed_,
                   static_cast<Sum*>(numbers.mutable_data_ptr()), sums_.numel());
    }
    store_images<Sum, Storage>(plan_, numbers, result_);
  }

 private:
  const ConvPlan& plan_;
  bool deterministic_, in_place_;
  Tensor& result_;
  Tensor sums_;
  FixedPointSums fixed_{};
  std::vector<Tensor> magnitudes_;
};

}  // namespace d2det
