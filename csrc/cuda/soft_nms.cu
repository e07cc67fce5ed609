// Soft-NMS on CUDA. Boxes are sorted by class; a block takes a whole class and repeats: the best
// box that is left, then a lower score for all that overlap it. Nothing is known of the classes on
// the host, which never waits: there is a block for each box, and those that do not start a class
// return at once.

#include <array>
#include <limits>

#include "../soft_nms_arguments.h"
#include "device.cuh"

namespace d2det {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kNumbers = 5;  // of a box: corners and score

// Rounded one by one, as on the CPU: a fused multiply-add could put an IoU on the other side of the
// threshold.
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double times(double a, double b) { return __dmul_rn(a, b); }

template <typename A>
struct Box {
  A x1, y1, x2, y2;
};

// Below 0 becomes 0; NaN stays.
template <typename A>
__device__ __forceinline__ A positive(A value) {
  return value < A(0) ? A(0) : value;
}

template <typename A>
__device__ __forceinline__ A area_of(const Box<A>& box) {
  return times(positive(box.x2 - box.x1), positive(box.y2 - box.y1));
}

// Without "+1"; 0 where it is not a number: a NaN corner makes the union NaN.
template <typename A>
__device__ __forceinline__ A iou(const Box<A>& taken, A taken_area, const Box<A>& other) {
  const A width = positive(min(taken.x2, other.x2) - max(taken.x1, other.x1));
  const A height = positive(min(taken.y2, other.y2) - max(taken.y1, other.y1));
  const A intersection = times(width, height);
  const A joined = area_of(other) + taken_area - intersection;
  const A result = intersection / joined;
  return joined > A(0) && result == result ? result : A(0);
}

template <typename A>
__device__ __forceinline__ A lowered(A score, A overlap, const NmsSettings<A>& settings) {
  if (settings.method == NmsMethod::kGaussian) {
    return score * exp(-times(overlap, overlap) / settings.sigma);
  }
  if (!(overlap > settings.iou_threshold)) return score;
  // Plain NMS: NaN falls away whatever the minimum.
  return settings.method == NmsMethod::kLinear ? times(score, A(1) - overlap) : A(NAN);
}

// The best score and whose it is; of equal scores the lower place wins. -1: there is none.
template <typename A>
struct Best {
  A score;
  int32_t place;

  __device__ __forceinline__ void update(A other_score, int32_t other_place) {
    const bool better = other_place >= 0 && (place < 0 || other_score > score ||
                                             (other_score == score && other_place < place));
    if (better) {
      score = other_score;
      place = other_place;
    }
  }
};

// The best of a block's threads, in all of them. `slots` must not be those of the call before.
template <typename A>
__device__ __forceinline__ Best<A> best_of_block(Best<A> best, Best<A>* slots) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const A score = __shfl_xor_sync(kFullWarp, best.score, lanes);
    const int32_t place = __shfl_xor_sync(kFullWarp, best.place, lanes);
    best.update(score, place);
  }
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = best;
  __syncthreads();
  best = slots[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) best.update(slots[warp].score, slots[warp].place);
  return best;
}

// How many of the sorted classes from `start` on are the same.
__device__ int32_t class_size(const int64_t* classes, int64_t start, int64_t count) {
  const int64_t own = classes[start];
  int64_t end = start;
  for (;;) {
    const int64_t i = end + threadIdx.x;
    const int same = __syncthreads_count(i < count && classes[i] == own);
    end += same;
    if (same < kThreads) return static_cast<int32_t>(end - start);
  }
}

// `classes` is sorted and `order` says which box each place has. `workspace` has kNumbers numbers a
// box, for classes of more than `capacity` boxes, which shared memory has room for.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    suppress_classes(const A* boxes, const A* scores, const int64_t* classes, const int64_t* order,
                     int64_t count, const __grid_constant__ NmsSettings<A> settings,
                     int32_t capacity, A* workspace, A* decayed) {
  const int64_t start = blockIdx.x;
  if (start > 0 && classes[start] == classes[start - 1]) return;
  D2DET_DYNAMIC_SHARED(A, shared);
  __shared__ Best<A> slots[2][kWarps];
  const int32_t size = class_size(classes, start, count);
  A* const numbers = size <= capacity ? shared : workspace + kNumbers * start;
  A* const live = numbers + 4 * static_cast<int64_t>(size);
  const auto box_at = [&](int32_t place) {
    const A* box = numbers + place;
    return Box<A>{box[0], box[size], box[2 * int64_t{size}], box[3 * int64_t{size}]};
  };

  // A thread keeps to its own places; only the boxes are read by all.
  Best<A> best{A(0), -1};
  for (int32_t place = threadIdx.x; place < size; place += kThreads) {
    const int64_t index = order[start + place];
#pragma unroll
    for (int64_t corner = 0; corner < 4; ++corner) {
      numbers[corner * size + place] = boxes[4 * index + corner];
    }
    const A score = scores[index];
    const bool alive = score >= settings.min_score;  // NaN is not
    live[place] = alive ? score : A(-INFINITY);
    decayed[index] = A(-INFINITY);
    if (alive) best.update(score, place);
  }
  for (int round = 0;; round ^= 1) {
    const Best<A> taken = best_of_block(best, slots[round]);
    if (taken.place < 0) return;
    const Box<A> box = box_at(taken.place);
    const A area = area_of(box);
    best = {A(0), -1};
    for (int32_t place = threadIdx.x; place < size; place += kThreads) {
      if (place == taken.place) {
        decayed[order[start + place]] = taken.score;
        live[place] = A(-INFINITY);
        continue;
      }
      A score = live[place];
      if (!(score >= settings.min_score)) continue;
      score = lowered(score, iou(box, area, box_at(place)), settings);
      const bool alive = score >= settings.min_score;
      live[place] = alive ? score : A(-INFINITY);
      if (alive) best.update(score, place);
    }
  }
}

// From scores in falling order to what the operator returns; `kept` was 0.
template <typename A, typename T>
__global__ void write_results(const A* ordered, const int64_t* order, int64_t count, A min_score,
                              int64_t* indices, T* scores, int64_t* kept) {
  D2DET_GRID_STRIDE(i, count) {
    const bool own = ordered[i] >= min_score;
    const bool next = i + 1 < count && ordered[i + 1] >= min_score;
    indices[i] = own ? order[i] : -1;
    scores[i] = own ? static_cast<T>(ordered[i]) : static_cast<T>(A(0));
    if (own && !next) *kept = i + 1;
  }
}

// torch::stable::sort(), which headers before torch 2.15 do not have; any later torch runs it.
std::tuple<Tensor, Tensor> stable_sort(const Tensor& values, bool descending) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(values), from(std::optional<bool>(true)), from(int64_t{0}),
                                    from(descending)};
  const auto code = torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION);
  D2DET_CHECK(code == AOTI_TORCH_SUCCESS, "torch could not sort");
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

template <typename A>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& boxes, const Tensor& scores,
                                       const Tensor& classes, const NmsSettings<A>& settings) {
  constexpr ScalarType dtype = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
  const int64_t count = scores.size(0);
  D2DET_CHECK(count < (int64_t{1} << 31), "too many boxes: ", count);
  Tensor indices = torch::stable::new_empty(classes, {count});
  Tensor values = torch::stable::new_empty(scores, {count});
  Tensor kept = torch::stable::new_zeros(classes, std::vector<int64_t>{});
  if (count == 0) return {indices, values, kept};

  const cudaStream_t stream = current_stream(boxes);
  const auto [sorted, by_class] = stable_sort(classes, false);
  const Tensor corners = as(boxes, dtype);
  const Tensor given = as(scores, dtype);
  const Tensor decayed = torch::stable::new_empty(given, {count});
  const int64_t capacity =
      std::min<int64_t>(count, kSharedBytesByDefault * 3 / 4 / (kNumbers * sizeof(A)));
  const Tensor workspace =
      torch::stable::new_empty(given, {count > capacity ? kNumbers * count : 0});
  D2DET_LAUNCH((suppress_classes<A>), static_cast<unsigned>(count), kThreads,
               capacity * kNumbers * sizeof(A), stream, corners.const_data_ptr<A>(),
               given.const_data_ptr<A>(), sorted.template const_data_ptr<int64_t>(),
               by_class.template const_data_ptr<int64_t>(), count, settings,
               static_cast<int32_t>(capacity), workspace.mutable_data_ptr<A>(),
               decayed.mutable_data_ptr<A>());
  const auto [ordered, order] = stable_sort(decayed, true);
  const A* falling = ordered.template const_data_ptr<A>();
  const int64_t* which = order.template const_data_ptr<int64_t>();
  dispatch_floating(scores.scalar_type(), [&](auto element) {
    using T = decltype(element);
    D2DET_LAUNCH((write_results<A, T>), grid_for(count, 256), 256, 0, stream, falling, which, count,
                 settings.min_score, indices.mutable_data_ptr<int64_t>(),
                 values.mutable_data_ptr<T>(), kept.mutable_data_ptr<int64_t>());
  });
  return {indices, values, kept};
}

std::tuple<Tensor, Tensor, Tensor> soft_nms(const Tensor& boxes, const Tensor& scores,
                                            const Tensor& classes, double iou_threshold,
                                            std::string method, double sigma, double min_score) {
  const NmsSettings<double> settings =
      check_soft_nms(boxes, scores, classes, iou_threshold, method, sigma, min_score);
  D2DET_DEVICE_GUARD(boxes);
  return with_nms_settings(boxes, scores, settings,
                           [&](const auto& own) { return run(boxes, scores, classes, own); });
}

}  // namespace

D2DET_CUDA_LIBRARY_IMPL(m) { m.impl("soft_nms", TORCH_BOX(&soft_nms)); }

}  // namespace d2det
