// What the kernels of deformable convolution are told: plain data, the same for every instruction
// set.
//
// Letters: L = Ho * Wo output pixels of an image, K = kh * kw taps, G offset groups. A pixel of the
// output is counted through all images: image * L + y * Wo + x.

#pragma once

#include <cstdint>

#include "element.h"

namespace d2det {

// What an instruction set's kernels want: numbers in a vector, and the rows a tile is a multiple
// of.
struct ConvTraits {
  int64_t lanes, rows;
};

struct ConvShape {
  int64_t images, channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  int64_t groups, offset_groups;
};

// A run of channels that fits a row of a packed matrix and lies in one group.
struct Panel {
  int64_t channel;
  int32_t width;
  int32_t group;
  int32_t offset_group;  // of input channels only
};

// The panels of one side; those of weight group s are [starts[s], starts[s + 1]). In packed
// matrices each is padded to `vectors` (1 or 2) vectors.
struct Panels {
  const Panel* items;
  const int64_t* starts;
  int64_t count;
  int32_t vectors;
};

// Images as (N, C, H, W) or as (N, H, W, C), both without gaps.
struct Images {
  void* data;
  Element type;
  bool channels_last;
};

template <typename T>
struct ConvProblem {
  ConvShape shape;
  Panels in, out;
  int64_t tile;        // pixels in a tile, a multiple of the rows of the product's kernel
  const void* rows;    // the input as (N, H, W, C), in T, or in bfloat16 where `bf16` says so
  const T* offset;     // (N, G, K, 2, L)
  const T* mask;       // (N, G, K, L), or null
  const void* packed;  // weights, as the pass wants them
  bool bf16;           // input rows and products of bfloat16, summed in float32
};

template <typename T>
struct ConvForward {
  ConvProblem<T> problem;
  int64_t block_taps;  // taps whose columns are multiplied together
  const T* bias;       // or null
  Images output;
};

// The part of a backward pass that one call of the kernel does: a block of input channels and a
// range of pixels, which no other call writes to.
template <typename T>
struct ConvBackward {
  ConvProblem<T> problem;
  Images grad_output;
  int64_t panel_begin, panel_end;  // input panels
  int64_t pixel_begin, pixel_end;
  T* grad_rows;    // (N, H, W, C), null where not asked for
  T* grad_taps;    // (3, N, G, K, L): y, x, mask; null where not asked for
  T* grad_packed;  // (K, input panels, output panels of a group, rows, row), null likewise
};

}  // namespace d2det
