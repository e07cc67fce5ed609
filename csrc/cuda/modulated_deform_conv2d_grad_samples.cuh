// Backward, second part: from the gradient of the columns to those of offset and mask, by the
// product of each column's gradient with its four corners, and to that of the input, by adding it
// to them.

#pragma once

#include "fixed_point.cuh"
#include "modulated_deform_conv2d_grad_columns.cuh"

namespace d2det {

// Where the input's gradient is added up in deterministic mode, and what bounds its terms.
struct FixedPointSums {
  enum class Pass : int32_t { kSum, kPoison };  // see fixed_point.cuh
  Pass pass;
  unsigned long long* units;
  const Magnitude *grad, *weight, *offset, *mask;  // mask: null for ones

  // No sum exceeds the number of its terms times the largest column gradient; twice that leaves
  // room for what was rounded.
  __device__ __forceinline__ double bound(const ConvProblem& p) const {
    return 2.0 * static_cast<double>(p.image_pixels()) * p.taps() * p.group_out * grad->largest() *
           weight->largest() * (mask ? mask->largest() : 1.0);
  }
  __device__ __forceinline__ bool all_finite() const {
    return (grad->not_finite | weight->not_finite | offset->not_finite |
            (mask ? mask->not_finite : 0)) == 0;
  }
};

// Eight lanes share a pixel and tap: they read whole lines of 128 bytes, and few steps sum them up.
constexpr int kSampleLanes = 8, kSampleThreads = 256;
constexpr int kSamplePixels = kSampleThreads / kSampleLanes;

template <typename Sum, int kUnit>
__device__ __forceinline__ void add_in_fixed_point(const FixedPointSums& to,
                                                   const FixedPoint& scale, int64_t index,
                                                   const Sum (&gradient)[kUnit], Sum weight) {
  for (int e = 0; e < kUnit; ++e) {
    const double value = static_cast<double>(weight * gradient[e]);
    const bool finite = fabs(value) <= 1.7976931348623157e308;
    if (to.pass == FixedPointSums::Pass::kSum && finite) scale.add(to.units + index + e, value);
    if (to.pass == FixedPointSums::Pass::kPoison && !finite) {
      FixedPoint::poison(to.units + index + e);
    }
  }
}

// Grid: x: tiles of kSamplePixels pixels of the range; y: taps, with a stride; z: offset groups.
// grad_offset and grad_mask: data is null where they are not asked for.
// kInput: adds to grad_input, and nothing else.
template <typename Math, bool kInput>
__global__ void __launch_bounds__(kSampleThreads)
    sample_gradient_kernel(const ConvProblem p, const typename Math::Column* __restrict__ input,
                           const typename Math::Column* __restrict__ columns,
                           const Coordinates offset, const Coordinates mask,
                           const FixedPointSums grad_input, const Coordinates grad_offset,
                           const Coordinates grad_mask, PixelRange range) {
  using Column = typename Math::Column;
  using Sum = typename Math::Sum;
  constexpr int kUnit = Math::kUnit;
  if (kInput && grad_input.pass == FixedPointSums::Pass::kPoison && grad_input.all_finite()) return;
  const FixedPoint scale(kInput ? grad_input.bound(p) : 0.0);
  const int lane = threadIdx.x % kSampleLanes;
  const int64_t index =
      range.begin + static_cast<int64_t>(blockIdx.x) * kSamplePixels + threadIdx.x / kSampleLanes;
  const bool inside = index < range.end;  // all lanes stay for the shuffles
  const OutputPixel pixel(p, index);
  const int64_t column_row = ((inside ? index : range.begin) - range.begin) * p.taps();
  const int64_t image_row = pixel.image * p.height * p.width;
  const int32_t offset_group = blockIdx.z;
  const int32_t channel0 = offset_group * p.channels_per_offset_group;

  for (int32_t tap = blockIdx.y; tap < p.taps(); tap += gridDim.y) {
    Motion<Sum> motion;
    motion.load(p, pixel, offset, mask, tap, offset_group);
    const Axes<Sum> axes(p, pixel, tap, motion);
    const int32_t ys[2] = {axes.y.low, axes.y.high}, xs[2] = {axes.x.low, axes.x.high};
    const Sum weights_y[2] = {axes.y.weight_low, axes.y.weight_high};
    const Sum weights_x[2] = {axes.x.weight_low, axes.x.weight_high};
    int64_t rows[4];
    Sum weights[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rows[i] = (image_row + static_cast<int64_t>(ys[i / 2]) * p.width + xs[i % 2]) * p.channels;
      weights[i] = weights_y[i / 2] * weights_x[i % 2];
    }
    Sum products[4] = {};
    const Column* const from = columns + (column_row + tap) * p.channels;
    for (int32_t c = lane * kUnit; inside && c < p.channels_per_offset_group;
         c += kSampleLanes * kUnit) {
      const int32_t channel = channel0 + c;
      Sum gradient[kUnit];
      widen<kUnit>(load_constant<kUnit>(from + channel), gradient);
      Vector<Column, kUnit> corner[4];
      if constexpr (!kInput) {
#pragma unroll
        for (int i = 0; i < 4; ++i) corner[i] = load_constant<kUnit>(input + rows[i] + channel);
      }
      if constexpr (kInput) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // What lies outside of the map is clamped to a pixel that is owed nothing.
          const Sum weight = weights[i] * motion.mask;
          if (weight != Sum(0)) {
            add_in_fixed_point<Sum, kUnit>(grad_input, scale, rows[i] + channel, gradient, weight);
          }
        }
      }
      if constexpr (!kInput) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Sum value[kUnit];
          widen<kUnit>(corner[i], value);
#pragma unroll
          for (int e = 0; e < kUnit; ++e) products[i] += gradient[e] * value[e];
        }
      }
    }
    if constexpr (!kInput) {
      const Sum slopes_y[2] = {axes.y.slope_low, axes.y.slope_high};
      const Sum slopes_x[2] = {axes.x.slope_low, axes.x.slope_high};
      Sum by_mask = 0, by_y = 0, by_x = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        by_mask += products[i] * weights[i];
        by_y += products[i] * slopes_y[i / 2] * weights_x[i % 2];
        by_x += products[i] * weights_y[i / 2] * slopes_x[i % 2];
      }
#pragma unroll
      for (int lanes = kSampleLanes / 2; lanes > 0; lanes /= 2) {
        by_mask += __shfl_xor_sync(kFullWarp, by_mask, lanes);
        by_y += __shfl_xor_sync(kFullWarp, by_y, lanes);
        by_x += __shfl_xor_sync(kFullWarp, by_x, lanes);
      }
      const int32_t channel = offset_group * p.taps() + tap;
      if (inside && lane == 0) {
        if (grad_offset.data) {
          const int64_t at = pixel.offset_index(p, channel);
          grad_offset.set(at, by_y * motion.mask);
          grad_offset.set(at + p.image_pixels(), by_x * motion.mask);
        }
        if (grad_mask.data) grad_mask.set(pixel.mask_index(p, channel), by_mask);
      }
    }
  }
}

// The sums of 64-bit integers as numbers, in place of them.
template <typename Sum>
__global__ void numbers_from_units_kernel(const ConvProblem p, const FixedPointSums gradient,
                                          Sum* numbers, int64_t count) {
  const FixedPoint scale(gradient.bound(p));
  D2DET_GRID_STRIDE(i, count) { numbers[i] = static_cast<Sum>(scale.value(gradient.units[i])); }
}

}  // namespace d2det
