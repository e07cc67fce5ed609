// Sampling for deformable convolution: where the taps of a tile's pixels lie, and the columns, the
// sampled values that the weights are multiplied with.
//
// A tile is a run of output pixels. Columns are panels: panel q of a tap is (tile, row), where a
// row is as many vectors as the panel is padded to, so that the product reads without gaps.

namespace d2det::D2DET_ISA {

// What the pixels of a tile need for one tap of one offset group, as arrays of the tile's length.
template <typename T>
struct Corners {
  int32_t* index[4];  // pixels of the input: (low, low), (low, high), (high, low), (high, high)
  T* weight[4];       // the mask is in them
};

// Memory that one thread works in, taken piece by piece.
struct Scratch {
  char* next;

  template <typename T>
  inline T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(next);
    next += (count * sizeof(T) + 63) / 64 * 64;
    return result;
  }
};

template <typename T>
inline Corners<T> take_corners(Scratch& scratch, int64_t tile) {
  Corners<T> result;
  for (int i = 0; i < 4; ++i) {
    result.index[i] = scratch.take<int32_t>(tile);
    result.weight[i] = scratch.take<T>(tile);
  }
  return result;
}

// Pixels of a tile that lie in one image: `count` from the tile's pixel `start` and from the
// image's pixel `first`.
struct Run {
  int64_t image, first, start, count;
};

// Calls f with each run of the pixels [begin, begin + count).
template <typename F>
inline void for_each_run(int64_t begin, int64_t count, int64_t pixels, const F& f) {
  for (int64_t start = 0; start < count;) {
    const int64_t image = (begin + start) / pixels, first = (begin + start) % pixels;
    const int64_t left = count - start, room = pixels - first;
    const int64_t size = left < room ? left : room;
    f(Run{image, first, start, size});
    start += size;
  }
}

// Where the first tap of each pixel of the tile lies, without offset.
template <typename T>
inline void first_taps(const ConvShape& s, int64_t begin, int64_t count, T* y, T* x) {
  for_each_run(begin, count, s.out_height * s.out_width, [&](const Run& run) {
    int64_t row = run.first / s.out_width, column = run.first % s.out_width;
    for (int64_t p = run.start; p < run.start + run.count; ++p) {
      y[p] = T(row * s.stride_y - s.padding_y);
      x[p] = T(column * s.stride_x - s.padding_x);
      if (++column == s.out_width) column = 0, ++row;
    }
  });
}

// Offsets and mask of one tap of one offset group, at the first pixel of a run.
template <typename T>
struct TapInputs {
  const T* y;
  const T* x;
  const T* mask;  // or null
};

template <typename T>
inline TapInputs<T> tap_inputs(const ConvProblem<T>& p, const Run& run, int64_t group,
                               int64_t tap) {
  const ConvShape& s = p.shape;
  const int64_t pixels = s.out_height * s.out_width, taps = s.kernel_y * s.kernel_x;
  const int64_t plane = (run.image * s.offset_groups + group) * taps + tap;
  const T* y = p.offset + 2 * plane * pixels + run.first;
  return {y, y + pixels, p.mask ? p.mask + plane * pixels + run.first : nullptr};
}

template <typename T>
inline void find_corners(const ConvProblem<T>& problem, const Run& run, int64_t group, int64_t tap,
                         const T* first_y, const T* first_x, const Corners<T>& corners) {
  const ConvShape& s = problem.shape;
  const T tap_y = T(tap / s.kernel_x * s.dilation_y), tap_x = T(tap % s.kernel_x * s.dilation_x);
  const TapInputs<T> in = tap_inputs(problem, run, group, tap);
  const int32_t height = s.height, width = s.width;
  const int64_t start = run.start;
  const T* base_y = first_y + start;
  const T* base_x = first_x + start;
#pragma GCC ivdep
  for (int64_t i = 0; i < run.count; ++i) {
    const Neighbours<T> y = conv_neighbours(base_y[i] + tap_y + in.y[i], height);
    const Neighbours<T> x = conv_neighbours(base_x[i] + tap_x + in.x[i], width);
    corners.index[0][start + i] = y.low * width + x.low;
    corners.index[1][start + i] = y.low * width + x.high;
    corners.index[2][start + i] = y.high * width + x.low;
    corners.index[3][start + i] = y.high * width + x.high;
    corners.weight[0][start + i] = y.weight_low * x.weight_low;
    corners.weight[1][start + i] = y.weight_low * x.weight_high;
    corners.weight[2][start + i] = y.weight_high * x.weight_low;
    corners.weight[3][start + i] = y.weight_high * x.weight_high;
  }
  if (!in.mask) return;
  for (int corner = 0; corner < 4; ++corner) {
    T* weight = corners.weight[corner] + start;
    for (int64_t i = 0; i < run.count; ++i) weight[i] *= in.mask[i];
  }
}

// The panels [begin, end) that lie in an offset group.
struct PanelRange {
  int64_t begin, end;
};

inline PanelRange panels_of_offset_group(const Panels& panels, int64_t begin, int64_t end,
                                         int64_t group) {
  while (begin < end && panels.items[begin].offset_group < group) ++begin;
  int64_t last = begin;
  while (last < end && panels.items[last].offset_group == group) ++last;
  return {begin, last};
}

// Writes the columns of one run, panel by panel at a distance of `panel_stride`; kDot: as pairs of
// bfloat16. The sum starts at zero, as in sample_backward: the same order of operations gives both
// the same bits.
template <typename T, int NV, bool kDot, typename R>
inline void gather_columns(const ConvProblem<T>& problem, const R* rows, const Run& run,
                           const Corners<T>& corners, PanelRange panels,
                           typename Factor<T, kDot>::type* columns, int64_t panel_stride) {
  using V = typename Vec<T>::type;
  constexpr int64_t lanes = Vec<T>::kSize, row = NV * lanes, stored = kDot ? row / 2 : row;
  const ConvShape& s = problem.shape;
  const R* image = rows + run.image * s.height * s.width * s.channels;
  for (int64_t p = run.start; p < run.start + run.count; ++p) {
    const R* from[4];
    V weight[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      from[i] = image + corners.index[i][p] * s.channels;
      weight[i] = splat(corners.weight[i][p]);
    }
    auto* to = columns + p * stored;
    for (int64_t q = panels.begin; q < panels.end; ++q, to += panel_stride) {
      const int64_t c = problem.in.items[q].channel;
      const int64_t width = problem.in.items[q].width;
      V value[NV] = {};
      if (width == row) {
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            value[v] = multiply_add(load_as(from[i] + c + v * lanes, T()), weight[i], value[v]);
          }
        }
      } else {
        T some[row] = {};
        for (int64_t j = 0; j < width; ++j) {
          for (int i = 0; i < 4; ++i) {
            some[j] = multiply_add(load_one(from[i] + c + j, T()), corners.weight[i][p], some[j]);
          }
        }
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) value[v] = load(some + v * lanes);
      }
      if constexpr (kDot) {
        T both[row];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) store(both + v * lanes, value[v]);
        pair_neighbours(both, row, to);
      } else {
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) store(to + v * lanes, value[v]);
      }
    }
  }
}

}  // namespace d2det::D2DET_ISA
