// Included by kernels.h, once for each instruction set.

#include "simd_exp.h"
#include "soft_nms.h"

namespace d2det::D2DET_ISA {

template <typename T>
struct LaneIndex;
template <>
struct LaneIndex<float> {
  using type = int32_t;
};
template <>
struct LaneIndex<double> {
  using type = int64_t;
};

template <typename V>
inline __attribute__((always_inline)) V larger(V a, V b) {
  return a < b ? b : a;
}
template <typename V>
inline __attribute__((always_inline)) V smaller(V a, V b) {
  return b < a ? b : a;
}

// What is left after a box was taken: how many boxes, and which is next; -1: none.
struct Remaining {
  int64_t live, next;
};

// Lowers the scores of all boxes that overlap box `taken`, which leaves.
template <NmsMethod kMethod, typename T>
Remaining take_box(const NmsBoxes<T>& boxes, const NmsSettings<T>& settings, int64_t taken) {
  using V = typename Vec<T>::type;
  using I = typename Vec<typename LaneIndex<T>::type>::type;
  constexpr int64_t kSize = Vec<T>::kSize;
  boxes.score[taken] = T(-1);
  const V x1 = splat(boxes.x1[taken]), y1 = splat(boxes.y1[taken]);
  const V x2 = splat(boxes.x2[taken]), y2 = splat(boxes.y2[taken]);
  const V area = splat(boxes.area[taken]);
  const V zero = {}, gone = splat(T(-1));
  V best = gone;
  I lane = {}, at = {}, count = {};
  for (int64_t i = 0; i < kSize; ++i) lane[i] = i;
  for (int64_t i = 0; i < boxes.count; i += kSize) {
    const V width = larger(smaller(x2, load(boxes.x2 + i)) - larger(x1, load(boxes.x1 + i)), zero);
    const V height = larger(smaller(y2, load(boxes.y2 + i)) - larger(y1, load(boxes.y1 + i)), zero);
    const V intersection = width * height;
    const V joined = area + load(boxes.area + i) - intersection;
    const V ratio = intersection / joined;
    // 0 where it is not a number: NaN fails the comparisons.
    V overlap = ratio == ratio ? ratio : zero;
    overlap = joined > zero ? overlap : zero;
    const V before = load(boxes.score + i);
    V score = before;
    if constexpr (kMethod == NmsMethod::kGaussian) {
      score *= exponential(-(overlap * overlap) / settings.sigma);
    } else if constexpr (kMethod == NmsMethod::kLinear) {
      score = overlap > settings.iou_threshold ? score * (1 - overlap) : score;
    } else {
      score = overlap > settings.iou_threshold ? gone : score;
    }
    score = score >= settings.min_score ? score : gone;
    score = before >= zero ? score : gone;  // -1 times 0 would be back at a minimum of 0
    store(boxes.score + i, score);
    count -= score >= zero;  // a comparison that holds is -1
    const auto better = score > best;
    best = better ? score : best;
    at = better ? lane : at;
    lane += kSize;
  }
  // Of equal scores the first.
  Remaining result{0, -1};
  T highest = T(-1);
  for (int64_t i = 0; i < kSize; ++i) {
    result.live += count[i];
    if (best[i] > highest || (best[i] == highest && result.next > at[i])) {
      highest = best[i];
      result.next = at[i];
    }
  }
  return result;
}

// Closes the gaps of boxes that have fallen away, up to whole vectors; returns the new place of
// the box `next`.
template <typename T>
int64_t close_gaps(NmsBoxes<T>& boxes, int64_t next) {
  int64_t kept = 0, moved = -1;
  for (int64_t i = 0; i < boxes.count; ++i) {
    if (!(boxes.score[i] >= T(0))) continue;
    if (i == next) moved = kept;
    boxes.x1[kept] = boxes.x1[i];
    boxes.y1[kept] = boxes.y1[i];
    boxes.x2[kept] = boxes.x2[i];
    boxes.y2[kept] = boxes.y2[i];
    boxes.area[kept] = boxes.area[i];
    boxes.score[kept] = boxes.score[i];
    boxes.index[kept++] = boxes.index[i];
  }
  for (int64_t i = kept; i < boxes.count; ++i) boxes.score[i] = T(-1);
  boxes.count = kept;
  return moved;
}

template <NmsMethod kMethod, typename T>
void suppress(NmsBoxes<T>& boxes, const NmsSettings<T>& settings, T* decayed) {
  constexpr int64_t kSize = Vec<T>::kSize;
  for (int64_t i = boxes.count; i < (boxes.count + kSize - 1) / kSize * kSize; ++i) {
    boxes.x1[i] = boxes.y1[i] = boxes.x2[i] = boxes.y2[i] = boxes.area[i] = T(0);
    boxes.score[i] = T(-1);
  }
  int64_t best = boxes.count > 0 ? 0 : -1;
  for (int64_t i = 1; i < boxes.count; ++i) {
    if (boxes.score[i] > boxes.score[best]) best = i;
  }
  while (best >= 0) {
    decayed[boxes.index[best]] = boxes.score[best];
    const Remaining left = take_box<kMethod>(boxes, settings, best);
    best = left.next;
    if (4 * left.live < 3 * boxes.count) best = close_gaps(boxes, best);
  }
}

template <typename T>
void suppress_class(NmsBoxes<T> boxes, const NmsSettings<T>& settings, T* decayed) {
  if (settings.method == NmsMethod::kLinear) {
    suppress<NmsMethod::kLinear>(boxes, settings, decayed);
  } else if (settings.method == NmsMethod::kGaussian) {
    suppress<NmsMethod::kGaussian>(boxes, settings, decayed);
  } else {
    suppress<NmsMethod::kHard>(boxes, settings, decayed);
  }
}

template void suppress_class<float>(NmsBoxes<float>, const NmsSettings<float>&, float*);
template void suppress_class<double>(NmsBoxes<double>, const NmsSettings<double>&, double*);

}  // namespace d2det::D2DET_ISA
