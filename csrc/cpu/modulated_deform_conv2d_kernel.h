// Deformable convolution of tiles of output pixels; included by kernels.h, once for each
// instruction set. In a tile, the columns of some taps are gathered and multiplied with packed
// weights while they are in the cache: the columns of the whole map are never made.

#include "deform_conv_problem.h"
// clang-format: the order of inclusion
#include "layout.h"
// clang-format: the order of inclusion
#include "multiply_add.h"
// clang-format: the order of inclusion
#include "gemm_kernel.h"
// clang-format: the order of inclusion
#include "deform_conv_weights.h"
// clang-format: the order of inclusion
#include "deform_conv_gather.h"
// clang-format: the order of inclusion
#include "deform_conv_backward.h"

namespace d2det::D2DET_ISA {

template <typename T, int NI, int NO, bool kDot = false>
void forward_tile(const ConvForward<T>& pass, int64_t begin, int64_t count, Scratch scratch) {
  using E = typename Factor<T, kDot>::type;
  constexpr int kDepth = kDot ? 2 : 1;
  constexpr int kLanes = Vec<T>::kSize, kIn = NI * kLanes / kDepth, kOut = NO * kLanes;
  const ConvProblem<T>& problem = pass.problem;
  const ConvShape& s = problem.shape;
  const int64_t taps = s.kernel_y * s.kernel_x, pixels = s.out_height * s.out_width;
  const int64_t per_group = s.channels / s.groups, tile = problem.tile;
  const int64_t rows = (count + kPixelRows - 1) / kPixelRows * kPixelRows;
  T* first_y = scratch.take<T>(tile);
  T* first_x = scratch.take<T>(tile);
  const Corners<T> corners = take_corners<T>(scratch, tile);
  T* sums = scratch.take<T>(problem.out.count * tile * kOut);
  const auto* input = static_cast<const typename Factor<T, kDot>::Row*>(problem.rows);
  E* columns = scratch.take<E>(pass.block_taps * problem.in.count * tile * kIn);
  first_taps(s, begin, count, first_y, first_x);

  for (int64_t tap = 0; tap < taps; tap += pass.block_taps) {
    const int64_t block = taps - tap < pass.block_taps ? taps - tap : pass.block_taps;
    for (int64_t t = 0; t < block; ++t) {
      PanelRange panels = {0, 0};
      for (int64_t g = 0; g < s.offset_groups; ++g) {
        panels = panels_of_offset_group(problem.in, panels.end, problem.in.count, g);
        for_each_run(begin, count, pixels, [&](const Run& run) {
          find_corners(problem, run, g, tap + t, first_y, first_x, corners);
          gather_columns<T, NI, kDot>(problem, input, run, corners, panels,
                                      columns + (t * problem.in.count + panels.begin) * tile * kIn,
                                      tile * kIn);
        });
      }
    }
    for (int64_t o = 0; o < problem.out.count; ++o) {
      const int64_t* group = problem.in.starts + problem.out.items[o].group;
      for (int64_t r = 0; r < rows; r += kPixelRows) {
        ProductTile<E, kPixelRows, NO, kIn, 1> product;
        T* sum = sums + (o * tile + r) * kOut;
        if (tap == 0) {
          product.clear();
        } else {
          product.read(sum);
        }
        // Pairs take half of the room that was made for a panel.
        const E* b = static_cast<const E*>(problem.packed) +
                     (o * taps * kDepth + tap) * (per_group / kDepth) * kOut;
        for (int64_t t = 0; t < block; ++t) {
          for (int64_t q = group[0]; q < group[1]; ++q) {
            const int64_t width = problem.in.items[q].width / kDepth;
            product.add(columns + ((t * problem.in.count + q) * tile + r) * kIn, b, width);
            b += width * kOut;
          }
        }
        product.write(sum);
      }
    }
  }

  with_element<T>(pass.output.type, pass.output.data, [&](auto* output) {
    for (int64_t o = 0; o < problem.out.count; ++o) {
      const Panel& panel = problem.out.items[o];
      T* sum = sums + o * tile * kOut;
      T bias[kOut] = {};
      for (int64_t i = 0; pass.bias && i < panel.width; ++i) bias[i] = pass.bias[panel.channel + i];
      if (pass.bias) {
        for (int64_t p = 0; p < count; ++p) {
          for (int64_t v = 0; v < kOut; v += kLanes) {
            store(sum + p * kOut + v, load(sum + p * kOut + v) + load(bias + v));
          }
        }
      }
      if (pass.output.channels_last) {
        for (int64_t p = 0; p < count; ++p) {
          convert_copy<T>(output + (begin + p) * s.out_channels + panel.channel, sum + p * kOut,
                          panel.width);
        }
        continue;
      }
      for_each_run(begin, count, pixels, [&](const Run& run) {
        auto* planes = output + (run.image * s.out_channels + panel.channel) * pixels + run.first;
        transpose_copy<T>(sum + run.start * kOut, kOut, run.count, panel.width,
                          sum + (run.start + run.count) * kOut,
                          [&](int64_t j) { return planes + j * pixels; });
      });
    }
  });
}

template <typename T>
void deform_conv_forward(const ConvForward<T>& pass, int64_t begin, int64_t count, char* scratch) {
#if D2DET_BF16_DOT
  if constexpr (sizeof(T) == 4) {
    if (pass.problem.bf16) {
      return forward_tile<T, 2, 2, true>(pass, begin, count, Scratch{scratch});
    }
  }
#endif
  const int in = pass.problem.in.vectors, out = pass.problem.out.vectors;
  const auto run = in == 1 ? (out == 1 ? &forward_tile<T, 1, 1> : &forward_tile<T, 1, 2>)
                           : (out == 1 ? &forward_tile<T, 2, 1> : &forward_tile<T, 2, 2>);
  run(pass, begin, count, Scratch{scratch});
}

// Rows of C for the weight gradient, whose A has as many rows as a panel of output channels.
constexpr int channel_rows(int64_t panel_row) {
  return panel_row % 8 == 0 && D2DET_VECTOR_BYTES == 64 ? 8 : panel_row % 4 == 0 ? 4 : 2;
}

template <typename T, int NI, int NO, bool kDot = false>
void backward_tile(const ConvBackward<T>& pass, int64_t begin, int64_t count, Scratch scratch) {
  constexpr int kLanes = Vec<T>::kSize, kIn = NI * kLanes, kOut = NO * kLanes;
  constexpr int kChannelRows = channel_rows(kOut);
  using E = typename Factor<T, kDot>::type;
  using R = typename Factor<T, kDot>::Row;
  constexpr int kDepth = kDot ? 2 : 1;
  const ConvProblem<T>& problem = pass.problem;
  const R* input = static_cast<const R*>(problem.rows);
  const ConvShape& s = problem.shape;
  const Panels &in = problem.in, &out = problem.out;
  const int64_t taps = s.kernel_y * s.kernel_x, pixels = s.out_height * s.out_width;
  const int64_t outs = s.out_channels / s.groups, tile = problem.tile;
  const int64_t rows = (count + kPixelRows - 1) / kPixelRows * kPixelRows;
  const bool products = pass.grad_rows || pass.grad_taps;
  T* first_y = scratch.take<T>(tile);
  T* first_x = scratch.take<T>(tile);
  const Corners<T> corners = take_corners<T>(scratch, tile);
  T* dots = scratch.take<T>(4 * tile);
  T* columns = scratch.take<T>((pass.panel_end - pass.panel_begin) * tile * kIn);
  T* grad = scratch.take<T>(out.count * tile * kOut);
  // Pairs of output channels for the columns' gradient; the weights' takes pairs of pixels.
  E* grad_rows = kDot ? scratch.take<E>(out.count * tile * kOut / 2) : reinterpret_cast<E*>(grad);
  first_taps(s, begin, count, first_y, first_x);

  const int64_t first_out = out.starts[in.items[pass.panel_begin].group];
  const int64_t end_out = out.starts[in.items[pass.panel_end - 1].group + 1];
  with_element<T>(pass.grad_output.type, pass.grad_output.data, [&](auto* data) {
    for (int64_t o = first_out; o < end_out; ++o) {
      const Panel& panel = out.items[o];
      T* to = grad + o * tile * kOut;
      if (pass.grad_output.channels_last) {
        for (int64_t p = 0; p < count; ++p) {
          convert_copy<T>(to + p * kOut, data + (begin + p) * s.out_channels + panel.channel,
                          panel.width);
        }
        continue;
      }
      for_each_run(begin, count, pixels, [&](const Run& run) {
        const auto* image = data + run.image * s.out_channels * pixels;
        transpose_copy<T>(image + panel.channel * pixels + run.first, pixels, panel.width,
                          run.count, image + s.out_channels * pixels,
                          [&](int64_t j) { return to + (run.start + j) * kOut; });
      });
    }
  });

  if constexpr (kDot) {
    for (int64_t o = first_out; o < end_out; ++o) {
      T* panel = grad + o * tile * kOut;
      if (count < tile) memset(panel + count * kOut, 0, kOut * sizeof(T));
      pair_neighbours(panel, tile * kOut, grad_rows + o * tile * kOut / 2);
      pair_rows(panel, tile, kOut);
    }
  }

  for (int64_t tap = 0; tap < taps; ++tap) {
    if (products) {
      for (int64_t q = pass.panel_begin; q < pass.panel_end; ++q) {
        const int64_t* group = out.starts + in.items[q].group;
        const E* weight = static_cast<const E*>(problem.packed) + (tap * in.count + q) * outs * kIn;
        for (int64_t r = 0; r < rows; r += kPixelRows) {
          ProductTile<E, kPixelRows, NI, kOut / kDepth, 1> product;
          product.clear();
          const E* b = weight;
          for (int64_t o = group[0]; o < group[1]; ++o) {
            const int64_t steps = out.items[o].width / kDepth;
            product.add(grad_rows + (o * tile + r) * kOut / kDepth, b, steps);
            b += steps * kIn;
          }
          product.write(columns + ((q - pass.panel_begin) * tile + r) * kIn);
        }
      }
    }

    PanelRange panels = {0, pass.panel_begin};
    for (int64_t g = 0; g < s.offset_groups; ++g) {
      panels = panels_of_offset_group(in, panels.end, pass.panel_end, g);
      if (panels.begin == panels.end) continue;
      for_each_run(begin, count, pixels, [&](const Run& run) {
        find_corners(problem, run, g, tap, first_y, first_x, corners);
        T* group_columns = columns + (panels.begin - pass.panel_begin) * tile * kIn;
        const auto sample = [&](auto function) {
          function(problem, input, run, corners, panels, group_columns, tile * kIn, pass.grad_rows,
                   dots);
        };
        if (!products) {
          gather_columns<T, NI, false>(problem, input, run, corners, panels, group_columns,
                                       tile * kIn);
        } else if (pass.grad_rows) {
          if (pass.grad_taps) {
            sample(pass.grad_packed ? &sample_backward<T, R, NI, true, true, true>
                                    : &sample_backward<T, R, NI, true, true, false>);
          } else {
            sample(pass.grad_packed ? &sample_backward<T, R, NI, true, false, true>
                                    : &sample_backward<T, R, NI, true, false, false>);
          }
        } else {
          sample(pass.grad_packed ? &sample_backward<T, R, NI, false, true, true>
                                  : &sample_backward<T, R, NI, false, true, false>);
        }
        if (pass.grad_taps) {
          tap_gradients(problem, run, g, tap, first_y, first_x, dots, pass.grad_taps);
        }
      });
    }

    if (!pass.grad_packed) continue;
    for (int64_t q = pass.panel_begin; q < pass.panel_end; ++q) {
      T* panel_columns = columns + (q - pass.panel_begin) * tile * kIn;
      if constexpr (kDot) {
        if (count < tile) memset(panel_columns + count * kIn, 0, kIn * sizeof(T));
        pair_rows(panel_columns, (count + 1) / 2 * 2, kIn);
      }
      const int64_t* group = out.starts + in.items[q].group;
      T* panel_sums = pass.grad_packed + (tap * in.count + q) * out.starts[1] * kOut * kIn;
      for (int64_t o = group[0]; o < group[1]; ++o) {
        for (int64_t m = 0; m < out.items[o].width; m += kChannelRows) {
          ProductTile<E, kChannelRows, NI, 1, kOut> product;
          T* sum = panel_sums + ((o - group[0]) * kOut + m) * kIn;
          product.read(sum);
          product.add(reinterpret_cast<const E*>(grad) + o * tile * kOut + m,
                      reinterpret_cast<const E*>(panel_columns), (count + kDepth - 1) / kDepth);
          product.write(sum);
        }
      }
    }
  }
}

// Zeroes what the pass adds to, then walks its pixels tile by tile.
template <typename T>
void deform_conv_backward(const ConvBackward<T>& pass, char* scratch) {
  const ConvProblem<T>& problem = pass.problem;
  const ConvShape& s = problem.shape;
  const Panels &in = problem.in, &out = problem.out;
  const int64_t taps = s.kernel_y * s.kernel_x, pixels = s.out_height * s.out_width;
  const Panel &first = in.items[pass.panel_begin], &last = in.items[pass.panel_end - 1];
  if (pass.grad_rows) {
    const int64_t width = last.channel + last.width - first.channel, area = s.height * s.width;
    const int64_t end = ((pass.pixel_end - 1) / pixels + 1) * area;
    for (int64_t i = pass.pixel_begin / pixels * area; i < end; ++i) {
      memset(pass.grad_rows + i * s.channels + first.channel, 0, width * sizeof(T));
    }
  }
  if (pass.grad_packed) {
    const int64_t lanes = Vec<T>::kSize;
    const int64_t panel = out.starts[1] * out.vectors * lanes * in.vectors * lanes;
    for (int64_t tap = 0; tap < taps; ++tap) {
      memset(pass.grad_packed + (tap * in.count + pass.panel_begin) * panel, 0,
             (pass.panel_end - pass.panel_begin) * panel * sizeof(T));
    }
  }
  auto run = in.vectors == 1
                 ? (out.vectors == 1 ? &backward_tile<T, 1, 1> : &backward_tile<T, 1, 2>)
                 : (out.vectors == 1 ? &backward_tile<T, 2, 1> : &backward_tile<T, 2, 2>);
#if D2DET_BF16_DOT
  if constexpr (sizeof(T) == 4) {
    if (problem.bf16) run = &backward_tile<T, 2, 2, true>;
  }
#endif
  for (int64_t begin = pass.pixel_begin; begin < pass.pixel_end; begin += problem.tile) {
    const int64_t left = pass.pixel_end - begin;
    run(pass, begin, left < problem.tile ? left : problem.tile, Scratch{scratch});
  }
}

template <typename T>
ConvTraits conv_traits() {
  return {Vec<T>::kSize, kPixelRows};
}

#define D2DET_DEFORM_CONV(T)                                                                      \
  template ConvTraits conv_traits<T>();                                                           \
  template void images_to_rows<T>(const Images&, int64_t, int64_t, int64_t, int64_t, T*);         \
  template void rows_to_images(const T*, int64_t, int64_t, int64_t, int64_t, const Images&);      \
  template void pack_for_forward(const ConvProblem<T>&, const T*, int64_t, int64_t, T*);          \
  template void pack_for_backward(const ConvProblem<T>&, const T*, int64_t, int64_t, T*);         \
  template void deform_conv_forward(const ConvForward<T>&, int64_t, int64_t, char*);              \
  template void deform_conv_backward(const ConvBackward<T>&, char*);                              \
  template void unpack_weight_gradient(const ConvProblem<T>&, T*, int64_t, int64_t, int64_t, T*); \
  template void add_copies(T*, int64_t, int64_t, int64_t, int64_t);
D2DET_DEFORM_CONV(float)
D2DET_DEFORM_CONV(double)
#undef D2DET_DEFORM_CONV
template void images_to_rows<float>(const Images&, int64_t, int64_t, int64_t, int64_t,
                                    BFloat16Bits*);

}  // namespace d2det::D2DET_ISA
