// What deform_roi_pool*.cpp ask of their kernels: the RoIs of one image and one level at a time.

#pragma once

#include "../bilinear.h"
#include "element.h"
#include "isa.h"

namespace d2det {

// Letters: o the output's side, s points a side in each bin, E entries of an axis in the plan:
// one for each bin (o * o) where offsets move bins, else one for each row or column of bins (o).
template <typename T>
struct RoiBatch {
  const T* rois;        // (R, 5)
  const T* offset;      // (R, 2, o, o) or null
  const T* modulation;  // (R, o, o) or null
  int32_t output_size, sampling_ratio;
  T scale, gamma;
  RoiConvention convention;
  int32_t height, width;   // of the level's map
  const int64_t* members;  // the RoIs of this image and level
  int64_t count;
  bool with_slopes;

  // The plan, made by plan_rois: which pixels every bin reads, and with which weights. Along each
  // axis at most 2 s; points that share a pixel are merged.
  int32_t* pixels;  // (count, 2, E, 1 + 2 s): how many, then y * width or x of each
  T* weights;       // (count, 2, E, 2 s, or 4 s with slopes): weights, then slopes
  int32_t* boxes;   // (count, 4): first and last row, first and last column that a RoI reads

  // Inlined wherever they are used: see the warning in kernels.h.
  D2DET_HOST_DEVICE int64_t bins() const { return int64_t(output_size) * output_size; }
  D2DET_HOST_DEVICE int64_t entries() const { return offset ? bins() : output_size; }
  D2DET_HOST_DEVICE int64_t reach() const { return 2 * int64_t(sampling_ratio); }
  D2DET_HOST_DEVICE int64_t pixel_step() const { return 1 + reach(); }
  D2DET_HOST_DEVICE int64_t weight_step() const { return with_slopes ? 2 * reach() : reach(); }
};

// A map as rows of channels.
template <typename T>
struct RoiMap {
  const T* features;  // null where not needed
  T* grads;           // null where not needed
  int64_t pixel_stride;
};

// (R, C, o, o): that of RoI r starts r * roi_bytes after `first`.
struct RoiTensor {
  Pixels first;
  int64_t roi_bytes;
};

// plan_rois: members [begin, end). fill_rows and drain_rows: the pixels [first_pixel, + pixels)
// of channels [first_channel, + channels), between a map and rows. pool_rois: members [begin, end).
// scatter_rois: all members, one block of channels; adds to sums, (count, o, o, 3), the products
// of grad_output with what the bins read, and with its derivatives for x and y.
D2DET_FOR_EACH_ISA(
    template <typename T> void plan_rois(const RoiBatch<T>& batch, int64_t begin, int64_t end);
    template <typename T>
    void fill_rows(const Pixels& map, int64_t first_channel, int64_t channels, int64_t first_pixel,
                   int64_t pixels, T* rows, int64_t row_stride);
    template <typename T>
    void drain_rows(const T* rows, int64_t row_stride, const Pixels& map, int64_t first_channel,
                    int64_t channels, int64_t first_pixel, int64_t pixels);
    template <typename T>
    void pool_rois(const RoiBatch<T>& batch, const RoiMap<T>& map, const RoiTensor& output,
                   int64_t first_channel, int64_t channels, int64_t begin, int64_t end, T* tile);
    template <typename T>
    void scatter_rois(const RoiBatch<T>& batch, const RoiMap<T>& map, const RoiTensor& grad_output,
                      int64_t first_channel, int64_t channels, T* sums, T* tile);)

}  // namespace d2det
