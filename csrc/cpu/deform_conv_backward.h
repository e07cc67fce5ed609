// The backward of sampling, one tap of a tile's pixels at a time: from the gradient of the columns,
// the gradients of the input, of the positions and of the mask, and the columns again in its place.

namespace d2det::D2DET_ISA {

// Pixels between the one that is worked on and the one that is fetched into the cache.
constexpr int64_t kFetchAhead = 4;

// Asks for what a later pixel reads and writes: the processor does not foresee its corners.
template <typename T, typename R>
inline __attribute__((always_inline)) void prefetch_corners(const ConvProblem<T>& problem,
                                                            const Run& run,
                                                            const Corners<T>& corners,
                                                            PanelRange panels, int64_t pixel,
                                                            const R* rows, T* grad_rows) {
  const ConvShape& s = problem.shape;
  if (pixel >= run.start + run.count) return;
  const Panel& last = problem.in.items[panels.end - 1];
  const int64_t begin = problem.in.items[panels.begin].channel, end = last.channel + last.width;
  const int64_t image = run.image * s.height * s.width * s.channels;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int64_t at = image + corners.index[i][pixel] * s.channels;
    for (int64_t c = begin; c < end; c += 64 / sizeof(R)) __builtin_prefetch(rows + at + c);
    for (int64_t c = begin; grad_rows && c < end; c += 64 / sizeof(T)) {
      __builtin_prefetch(grad_rows + at + c, 1);
    }
  }
}

// Reads the gradient of the columns of one run, `columns`. kScatter: adds to the gradient of the
// input; kDots: writes the products of the gradient with the four corners to `dots` (pixels, 4) in
// the order of store_sums; kColumns: leaves the columns in `columns`.
template <typename T, typename R, int NV, bool kScatter, bool kDots, bool kColumns>
void sample_backward(const ConvProblem<T>& problem, const R* rows, const Run& run,
                     const Corners<T>& corners, PanelRange panels, T* columns, int64_t panel_stride,
                     T* grad_rows, T* dots) {
  using V = typename Vec<T>::type;
  constexpr int64_t lanes = Vec<T>::kSize, row = NV * lanes;
  const ConvShape& s = problem.shape;
  const int64_t image = run.image * s.height * s.width * s.channels;
  for (int64_t p = run.start; p < run.start + run.count; ++p) {
    int64_t at[4];
    T weight[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      at[i] = image + corners.index[i][p] * s.channels;
      weight[i] = corners.weight[i][p];
    }
    // Corners that were clamped to the border are the same pixel as another.
    const bool distinct = at[0] != at[1] && at[0] != at[2];
    prefetch_corners(problem, run, corners, panels, p + kFetchAhead, rows,
                     kScatter ? grad_rows : nullptr);
    V sum[4] = {};
    T rest[4] = {};
    T* column = columns + p * row;
    for (int64_t q = panels.begin; q < panels.end; ++q, column += panel_stride) {
      const int64_t c = problem.in.items[q].channel;
      const int64_t width = problem.in.items[q].width;
      if (width == row) {
#pragma GCC unroll 2
        for (int64_t v = 0; v < row; v += lanes) {
          const V grad = load(column + v);
          V value = {};
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const V pixel = load_as(rows + at[i] + c + v, T());
            if (kDots) sum[i] = multiply_add(grad, pixel, sum[i]);
            if (kColumns) value = multiply_add(pixel, splat(weight[i]), value);
          }
          T* to = grad_rows + c + v;
          if (kScatter && distinct) {
            // All loads before the stores: rows of the map are often a multiple of 4096 bytes
            // apart, and a load that follows a store at the same place in a page waits for it.
            V next[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
              next[i] = multiply_add(grad, splat(weight[i]), load(to + at[i]));
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) store(to + at[i], next[i]);
          } else if (kScatter) {
            for (int i = 0; i < 4; ++i) {
              store(to + at[i], multiply_add(grad, splat(weight[i]), load(to + at[i])));
            }
          }
          if (kColumns) store(column + v, value);
        }
      } else {
        for (int64_t v = 0; v < width; ++v) {
          const T grad = column[v];
          T value = 0;
          for (int i = 0; i < 4; ++i) {
            const T pixel = load_one(rows + at[i] + c + v, T());
            if (kDots) rest[i] = multiply_add(grad, pixel, rest[i]);
            value = multiply_add(pixel, weight[i], value);
            T* to = grad_rows + at[i] + c + v;
            if (kScatter) *to = multiply_add(grad, weight[i], *to);
          }
          if (kColumns) column[v] = value;
        }
      }
    }
    if (kDots) {
      T* to = dots + 4 * p;
      store_sums<T>(sum[0], sum[1], sum[2], sum[3], to);
      to[0] += rest[0], to[1] += rest[2], to[2] += rest[1], to[3] += rest[3];
    }
  }
}

// Gradients of the positions and the mask of one tap, from the products of sample_backward.
template <typename T>
inline void tap_gradients(const ConvProblem<T>& problem, const Run& run, int64_t group, int64_t tap,
                          const T* first_y, const T* first_x, const T* dots, T* grad_taps) {
  const ConvShape& s = problem.shape;
  const int64_t pixels = s.out_height * s.out_width, taps = s.kernel_y * s.kernel_x;
  const T tap_y = T(tap / s.kernel_x * s.dilation_y), tap_x = T(tap % s.kernel_x * s.dilation_x);
  const TapInputs<T> in = tap_inputs(problem, run, group, tap);
  const int64_t kind = s.images * s.offset_groups * taps * pixels;
  T* grad = grad_taps + ((run.image * s.offset_groups + group) * taps + tap) * pixels + run.first;
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t p = run.start + i;
    const Neighbours<T> y =
        conv_neighbours(first_y[p] + tap_y + in.y[i], static_cast<int32_t>(s.height));
    const Neighbours<T> x =
        conv_neighbours(first_x[p] + tap_x + in.x[i], static_cast<int32_t>(s.width));
    const T low_low = dots[4 * p], high_low = dots[4 * p + 1];
    const T low_high = dots[4 * p + 2], high_high = dots[4 * p + 3];
    const T at_low = x.weight_low * low_low + x.weight_high * low_high;
    const T at_high = x.weight_low * high_low + x.weight_high * high_high;
    const T slope_low = x.slope_low * low_low + x.slope_high * low_high;
    const T slope_high = x.slope_low * high_low + x.slope_high * high_high;
    const T mask = in.mask ? in.mask[i] : T(1);
    grad[i] = (y.slope_low * at_low + y.slope_high * at_high) * mask;
    grad[kind + i] = (y.weight_low * slope_low + y.weight_high * slope_high) * mask;
    grad[2 * kind + i] = y.weight_low * at_low + y.weight_high * at_high;
  }
}

}  // namespace d2det::D2DET_ISA
