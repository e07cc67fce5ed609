#include "deform_conv_setup.h"

#include <numeric>

namespace d2det {

ConvShape conv_shape(const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
                     const Tensor& weight, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  check_floating("input", input, {-1, -1, -1, -1}, input);
  check_floating("weight", weight, {-1, -1, -1, -1}, input);
  for (const auto* pair : {&stride, &padding, &dilation}) {
    D2DET_CHECK(pair->size() == 2, "stride, padding and dilation must be two numbers each");
    for (const int64_t value : *pair) {
      D2DET_CHECK(value >= (pair == &padding ? 0 : 1) && value < (int64_t(1) << 24),
                  "stride and dilation must be at least 1, padding at least 0, got ", value);
    }
  }
  ConvShape s;
  s.images = input.size(0), s.channels = input.size(1);
  s.height = input.size(2), s.width = input.size(3);
  s.out_channels = weight.size(0), s.kernel_y = weight.size(2), s.kernel_x = weight.size(3);
  s.stride_y = stride[0], s.stride_x = stride[1];
  s.padding_y = padding[0], s.padding_x = padding[1];
  s.dilation_y = dilation[0], s.dilation_x = dilation[1];
  const int64_t per_group = weight.size(1), taps = s.kernel_y * s.kernel_x;
  D2DET_CHECK(s.channels > 0 && s.height > 0 && s.width > 0 && weight.numel() > 0,
              "only the batch may be empty: input has shape ", shape_text(input), ", weight ",
              shape_text(weight));
  D2DET_CHECK(s.channels % per_group == 0 && s.out_channels % (s.channels / per_group) == 0,
              "weight of shape ", shape_text(weight), " does not fit input of shape ",
              shape_text(input));
  D2DET_CHECK(s.height * s.width < (int64_t(1) << 31) - 1, "input of shape ", shape_text(input),
              " has more than 2^31 - 2 pixels in an image");
  s.groups = s.channels / per_group;
  s.out_height =
      (s.height + 2 * s.padding_y - s.dilation_y * (s.kernel_y - 1) - 1) / s.stride_y + 1;
  s.out_width = (s.width + 2 * s.padding_x - s.dilation_x * (s.kernel_x - 1) - 1) / s.stride_x + 1;
  D2DET_CHECK(s.height + 2 * s.padding_y > s.dilation_y * (s.kernel_y - 1) &&
                  s.width + 2 * s.padding_x > s.dilation_x * (s.kernel_x - 1),
              "weight of shape ", shape_text(weight), " is larger than the padded input of shape ",
              shape_text(input));
  check_floating("offset", offset, {s.images, -1, s.out_height, s.out_width}, input);
  s.offset_groups = offset.size(1) / (2 * taps);
  D2DET_CHECK(
      s.offset_groups > 0 && offset.size(1) % (2 * taps) == 0 && s.channels % s.offset_groups == 0,
      "offset of shape ", shape_text(offset), " does not fit input of shape ", shape_text(input),
      " and weight of shape ", shape_text(weight));
  if (mask) {
    check_floating("mask", *mask, {s.images, s.offset_groups * taps, s.out_height, s.out_width},
                   input);
  }
  return s;
}

PanelList::PanelList(int64_t channels, int64_t run, int64_t cut, int64_t lanes) {
  vectors = std::gcd(run, cut) <= lanes ? 1 : 2;
  const int64_t row = vectors * lanes;
  for (int64_t begin = 0; begin < channels;) {
    const int64_t end = std::min({(begin / run + 1) * run, (begin / cut + 1) * cut, begin + row});
    if (begin % run == 0) starts.push_back(static_cast<int64_t>(items.size()));
    items.push_back({begin, static_cast<int32_t>(end - begin), static_cast<int32_t>(begin / run),
                     static_cast<int32_t>(begin / cut)});
    begin = end;
  }
  starts.push_back(static_cast<int64_t>(items.size()));
}

template <typename T>
Tensor contiguous_in(const Tensor& value) {
  if (value.is_contiguous() || !is_channels_last(value)) return as(value, kScalar<T>);
  const Tensor rows =
      value.scalar_type() == kScalar<T> ? value : torch::stable::to(value, kScalar<T>);
  Tensor result = torch::stable::empty(value.sizes(), kScalar<T>);
  const int64_t channels = value.size(1), pixels = value.size(2) * value.size(3);
  const T* from = static_cast<const T*>(rows.data_ptr());
  const Images to = images(result);
  torch::stable::parallel_for(0, value.size(0), 8, [&](int64_t begin, int64_t end) {
    D2DET_SELECT_ISA(rows_to_images<T>)(from, channels, pixels, begin * pixels, end * pixels, to);
  });
  return result;
}

template <typename T>
void copy_to_channels_last(const Tensor& from, const Tensor& to) {
  const int64_t channels = from.size(1), pixels = from.size(2) * from.size(3);
  const Images given = images(from);
  T* rows = static_cast<T*>(to.data_ptr());
  torch::stable::parallel_for(0, from.size(0), 8, [&](int64_t begin, int64_t end) {
    D2DET_SELECT_ISA(images_to_rows<T, T>)
    (given, channels, pixels, begin * pixels, end * pixels, rows);
  });
}

namespace {

// (N, H, W, C) in D, a type of torch's that is D in memory; where the input lies so already, the
// input. T is what the numbers are converted through.
template <typename T, typename D>
Tensor as_rows(const Tensor& input, ScalarType type) {
  if (input.scalar_type() == type && is_channels_last(input)) return input;
  const Tensor given = as_images(input);
  const int64_t channels = input.size(1), pixels = input.size(2) * input.size(3);
  const int64_t all = input.size(0) * pixels;
  Tensor rows = torch::stable::empty({all, channels}, type);
  use_large_pages(rows);
  D* to = static_cast<D*>(rows.data_ptr());
  const Images from = images(given);
  const auto copy = D2DET_SELECT_ISA(images_to_rows<T, D>);
  torch::stable::parallel_for(0, (all + 15) / 16, 64, [&](int64_t begin, int64_t end) {
    copy(from, channels, pixels, begin * 16, std::min(end * 16, all), to);
  });
  return rows;
}

}  // namespace

template <typename T>
ConvTensors<T>::ConvTensors(const ConvShape& shape, const Tensor& given_input,
                            const Tensor& given_offset, const std::optional<Tensor>& given_mask)
    : in(shape.channels, shape.channels / shape.groups, shape.channels / shape.offset_groups,
         D2DET_SELECT_ISA(conv_traits<T>)().lanes),
      out(shape.out_channels, shape.out_channels / shape.groups, shape.out_channels,
          D2DET_SELECT_ISA(conv_traits<T>)().lanes),
      offset(as(given_offset, kScalar<T>)),
      problem{} {
  if (given_mask) mask = as(*given_mask, kScalar<T>);
  problem.shape = shape;
  problem.in = in.view();
  problem.out = out.view();
  problem.bf16 = multiplies_bf16(given_input.scalar_type());
  rows = problem.bf16 ? as_rows<float, BFloat16Bits>(given_input, ScalarType::BFloat16)
                      : as_rows<T, T>(given_input, kScalar<T>);
  problem.rows = rows.data_ptr();
  problem.offset = offset.const_data_ptr<T>();
  problem.mask = mask ? mask->const_data_ptr<T>() : nullptr;
}

template <typename T>
bool ConvTensors<T>::multiplies_bf16([[maybe_unused]] ScalarType type) const {
#if D2DET_X86
  const ConvShape& s = problem.shape;
  return sizeof(T) == 4 && type == ScalarType::BFloat16 && cpu_isa() == Isa::kAvx512Bf16 &&
         in.vectors == 2 && out.vectors == 2 && s.channels / s.groups % 2 == 0 &&
         s.channels / s.offset_groups % 2 == 0 && s.out_channels / s.groups % 2 == 0;
#else
  return false;
#endif
}

template Tensor contiguous_in<float>(const Tensor&);
template Tensor contiguous_in<double>(const Tensor&);
template void copy_to_channels_last<float>(const Tensor&, const Tensor&);
template void copy_to_channels_last<double>(const Tensor&, const Tensor&);
template struct ConvTensors<float>;
template struct ConvTensors<double>;

}  // namespace d2det
