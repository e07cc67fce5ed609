// What the kernels of the modulated deformable convolution share: the problem's sizes, the order in
// which channels are taken, and where each tap of each output pixel samples.
//
// Feature maps are channels-last. A "chunk" is the run of channels of one tap that a tile holds at
// a time; all channels of a chunk have the same offset group, hence the same four corners. "Groups"
// are weight groups, of which several may have been merged into one (see the host side).

#pragma once

#include "../bilinear.h"
#include "device.cuh"

namespace d2det {

constexpr int kMaxTilePixels = 256;  // of any kernel's tile

struct ConvProblem {
  int64_t images, pixels;  // pixels: of the output, all images
  int32_t height, width, channels;
  int32_t out_height, out_width, out_channels;
  int32_t kernel_h, kernel_w, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  int32_t offset_groups, channels_per_offset_group;
  int32_t groups, group_in, group_out;  // channels of one group
  double images_per_pixel;              // 1 / image_pixels()

  __host__ __device__ int32_t taps() const { return kernel_h * kernel_w; }
  __host__ __device__ int32_t image_pixels() const { return out_height * out_width; }

  // The image of an output pixel. By a product and a correction: a division of 64 bits is a
  // function call, and costs registers in every loop around it.
  __device__ __forceinline__ int64_t image_of(int64_t pixel) const {
    const int64_t guess = static_cast<int64_t>(static_cast<double>(pixel) * images_per_pixel);
    const int64_t rest = pixel - guess * image_pixels();
    return guess + (rest >= image_pixels() ? 1 : 0) - (rest < 0 ? 1 : 0);
  }
};

// Offsets or mask: their dtype may be the input's or float32, so it is told apart at run time; few
// values are read for each that is computed.
struct Coordinates {
  const void* data;  // null: a mask of ones
  ScalarType type;

  template <typename T>
  __device__ __forceinline__ T at(int64_t index) const {
    switch (type) {
      case ScalarType::Half:
        return static_cast<T>(static_cast<float>(static_cast<const Half*>(data)[index]));
      case ScalarType::BFloat16:
        return static_cast<T>(static_cast<float>(static_cast<const BFloat16*>(data)[index]));
      case ScalarType::Double:
        return static_cast<T>(static_cast<const double*>(data)[index]);
      default:
        return static_cast<T>(static_cast<const float*>(data)[index]);
    }
  }

  template <typename T>
  __device__ __forceinline__ void set(int64_t index, T value) const {
    void* const to = const_cast<void*>(data);
    switch (type) {
      case ScalarType::Half:
        static_cast<Half*>(to)[index] = Half(static_cast<float>(value));
        break;
      case ScalarType::BFloat16:
        static_cast<BFloat16*>(to)[index] = BFloat16(static_cast<float>(value));
        break;
      case ScalarType::Double:
        static_cast<double*>(to)[index] = static_cast<double>(value);
        break;
      default:
        static_cast<float*>(to)[index] = static_cast<float>(value);
    }
  }
};

// Goes through the chunks of a group: taps, in each its offset groups, in each runs of `kChunk`
// channels. The same for all threads of a block.
template <int kChunk>
struct ChunkCursor {
  int32_t tap, channel, end;  // `end`: of the channels with this offset group
  int32_t segment;            // counts pairs of tap and offset group

  __device__ __forceinline__ ChunkCursor(const ConvProblem& p, int32_t group, int32_t first_tap)
      : tap(first_tap), channel(group * p.group_in), segment(0) {
    find_end(p, group);
  }
  __device__ __forceinline__ void find_end(const ConvProblem& p, int32_t group) {
    const int32_t next = (channel / p.channels_per_offset_group + 1) * p.channels_per_offset_group;
    end = min(next, (group + 1) * p.group_in);
  }
  // Whether the next chunk has other corners.
  __device__ __forceinline__ bool advance(const ConvProblem& p, int32_t group) {
    channel += kChunk;
    if (channel < end) return false;
    channel = end;
    if (channel == (group + 1) * p.group_in) {
      channel = group * p.group_in;
      ++tap;
    }
    find_end(p, group);
    ++segment;
    return true;
  }
};

// An output pixel that a thread computes the corners of.
struct OutputPixel {
  int64_t image;
  int32_t place, y, x;  // place: y * out_width + x
  bool inside;

  __device__ __forceinline__ OutputPixel(const ConvProblem& p, int64_t index) {
    inside = index < p.pixels;
    const int64_t clamped = inside ? index : p.pixels - 1;
    image = p.image_of(clamped);
    place = static_cast<int32_t>(clamped - image * p.image_pixels());
    y = place / p.out_width;
    x = place - y * p.out_width;
  }
  // Index of an offset (2 * channel and the next) or of a mask value.
  __device__ __forceinline__ int64_t mask_index(const ConvProblem& p, int32_t channel) const {
    const int64_t channels = static_cast<int64_t>(p.offset_groups) * p.taps();
    return (image * channels + channel) * p.image_pixels() + place;
  }
  __device__ __forceinline__ int64_t offset_index(const ConvProblem& p, int32_t channel) const {
    const int64_t channels = static_cast<int64_t>(p.offset_groups) * p.taps();
    return (image * channels + channel) * 2 * p.image_pixels() + place;
  }
};

// What is read of offset and mask for one pixel and tap.
template <typename T>
struct Motion {
  T y, x, mask;

  __device__ __forceinline__ void load(const ConvProblem& p, const OutputPixel& pixel,
                                       const Coordinates& offset, const Coordinates& mask_values,
                                       int32_t tap, int32_t offset_group) {
    const int32_t channel = offset_group * p.taps() + tap;
    const int64_t index = pixel.offset_index(p, channel);
    y = offset.at<T>(index);
    x = offset.at<T>(index + p.image_pixels());
    mask = mask_values.data ? mask_values.at<T>(pixel.mask_index(p, channel)) : T(1);
  }
};

template <typename T>
struct Axes {
  Neighbours<T> y, x;

  __device__ __forceinline__ Axes(const ConvProblem& p, const OutputPixel& pixel, int32_t tap,
                                  const Motion<T>& motion) {
    const int32_t tap_y = tap / p.kernel_w, tap_x = tap - tap_y * p.kernel_w;
    const int32_t base_y = pixel.y * p.stride_y - p.padding_y + tap_y * p.dilation_y;
    const int32_t base_x = pixel.x * p.stride_x - p.padding_x + tap_x * p.dilation_x;
    y = conv_neighbours(static_cast<T>(base_y) + motion.y, p.height);
    x = conv_neighbours(static_cast<T>(base_x) + motion.x, p.width);
  }
};

// The four pixels to sample, counted from the first pixel of the tile's first image (the host makes
// sure that this fits 32 bits), and their weights with the mask folded in.
template <typename T>
struct alignas(16) Corners {
  int32_t row[4];
  T weight[4];

  __device__ __forceinline__ void set(const ConvProblem& p, const OutputPixel& pixel,
                                      int64_t first_image, int32_t tap, const Motion<T>& motion) {
    const Axes<T> axes(p, pixel, tap, motion);
    const int32_t image = static_cast<int32_t>(pixel.image - first_image) * p.height;
    row[0] = (image + axes.y.low) * p.width + axes.x.low;
    row[1] = (image + axes.y.low) * p.width + axes.x.high;
    row[2] = (image + axes.y.high) * p.width + axes.x.low;
    row[3] = (image + axes.y.high) * p.width + axes.x.high;
    weight[0] = axes.y.weight_low * axes.x.weight_low * motion.mask;
    weight[1] = axes.y.weight_low * axes.x.weight_high * motion.mask;
    weight[2] = axes.y.weight_high * axes.x.weight_low * motion.mask;
    weight[3] = axes.y.weight_high * axes.x.weight_high * motion.mask;
    if (!pixel.inside) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weight[i] = T(0);
    }
  }
};

}  // namespace d2det
