// Weights of deformable convolution as the products want them, and the weights' gradient back.
// Included by modulated_deform_conv2d_kernel.h.

namespace d2det::D2DET_ISA {

// (output panel, tap, input channel of the group, row): rows of output channels.
template <typename T>
void pack_for_forward(const ConvProblem<T>& problem, const T* weight, int64_t begin, int64_t end,
                      T* packed) {
  const ConvShape& s = problem.shape;
  const int64_t taps = s.kernel_y * s.kernel_x, per_group = s.channels / s.groups;
  const int64_t row = problem.out.vectors * Vec<T>::kSize, length = per_group * taps;
  for (int64_t o = begin; o < end; ++o) {
    const Panel& panel = problem.out.items[o];
    T* to = packed + o * length * row;
    if (panel.width < row) memset(to, 0, length * row * sizeof(T));
    const T* from = weight + panel.channel * length;
    transpose_copy<T>(from, length, panel.width, length, from + panel.width * length,
                      [&](int64_t j) { return to + (j % taps * per_group + j / taps) * row; });
    if constexpr (sizeof(T) == 4) {
      if (problem.bf16) pair_rows(to, length, row);
    }
  }
}

// (tap, input panel, output channel of the group, row): rows of input channels.
template <typename T>
void pack_for_backward(const ConvProblem<T>& problem, const T* weight, int64_t begin, int64_t end,
                       T* packed) {
  const ConvShape& s = problem.shape;
  const int64_t taps = s.kernel_y * s.kernel_x;
  const int64_t per_group = s.channels / s.groups, outs = s.out_channels / s.groups;
  const int64_t row = problem.in.vectors * Vec<T>::kSize;
  const T* weight_end = weight + s.out_channels * per_group * taps;
  for (int64_t q = begin; q < end; ++q) {
    const Panel& panel = problem.in.items[q];
    for (int64_t o = 0; o < outs; ++o) {
      T* to = packed + (q * outs + o) * row;
      const int64_t stride = problem.in.count * outs * row;
      if (panel.width < row) {
        for (int64_t tap = 0; tap < taps; ++tap) memset(to + tap * stride, 0, row * sizeof(T));
      }
      const T* from =
          weight + ((panel.group * outs + o) * per_group + panel.channel % per_group) * taps;
      transpose_copy<T>(from, taps, panel.width, taps, weight_end,
                        [&](int64_t tap) { return to + tap * stride; });
    }
    if constexpr (sizeof(T) == 4) {
      for (int64_t tap = 0; problem.bf16 && tap < taps; ++tap) {
        pair_rows(packed + (tap * problem.in.count + q) * outs * row, outs, row);
      }
    }
  }
}

// The weight's gradient (Cout, Cin / groups, K) for input panels [begin, end), from the sum of
// `copies` packed gradients.
template <typename T>
void unpack_weight_gradient(const ConvProblem<T>& problem, T* packed, int64_t copies, int64_t begin,
                            int64_t end, T* weight) {
  const ConvShape& s = problem.shape;
  const Panels &in = problem.in, &out = problem.out;
  const int64_t taps = s.kernel_y * s.kernel_x;
  const int64_t per_group = s.channels / s.groups;
  const int64_t row = in.vectors * Vec<T>::kSize, out_row = out.vectors * Vec<T>::kSize;
  const int64_t panel_size = out.starts[1] * out_row * row, tap_size = in.count * panel_size;
  for (int64_t q = begin; q < end; ++q) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      T* sum = packed + tap * tap_size + q * panel_size;
      for (int64_t copy = 1; copy < copies; ++copy) {
        const T* other = sum + copy * taps * tap_size;
        for (int64_t i = 0; i < panel_size; i += Vec<T>::kSize) {
          store(sum + i, load(sum + i) + load(other + i));
        }
      }
    }
    const Panel& panel = in.items[q];
    const int64_t* group = out.starts + panel.group;
    for (int64_t o = group[0]; o < group[1]; ++o) {
      for (int64_t m = 0; m < out.items[o].width; ++m) {
        const T* from = packed + q * panel_size + ((o - group[0]) * out_row + m) * row;
        T* to =
            weight + ((out.items[o].channel + m) * per_group + panel.channel % per_group) * taps;
        transpose_copy<T>(from, tap_size, taps, panel.width, from + (taps - 1) * tap_size + row,
                          [&](int64_t j) { return to + j * taps; });
      }
    }
  }
}

// Adds the other copies, `size` apart, to the first.
template <typename T>
void add_copies(T* sum, int64_t size, int64_t copies, int64_t begin, int64_t end) {
  for (int64_t copy = 1; copy < copies; ++copy) {
    const T* other = sum + copy * size;
    for (int64_t i = begin; i < end; ++i) sum[i] += other[i];
  }
}

}  // namespace d2det::D2DET_ISA
