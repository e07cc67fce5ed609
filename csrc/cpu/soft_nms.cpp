// Soft-NMS on CPU: classes in parallel, one pass over a class's remaining boxes for each one taken.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string_view>
#include <tuple>
#include <vector>

#include "../tensor.h"

namespace d2det {
namespace {

enum class Method { kLinear, kGaussian, kHard };

Method parse_method(std::string_view name) {
  if (name == "linear") return Method::kLinear;
  if (name == "gaussian") return Method::kGaussian;
  D2DET_CHECK(name == "hard", "method must be linear, gaussian or hard, got ", name);
  return Method::kHard;
}

template <typename scalar_t>
struct Settings {
  Method method;
  scalar_t iou_threshold;
  scalar_t sigma;
  scalar_t min_score;
};

template <typename scalar_t>
struct Candidate {
  scalar_t x1, y1, x2, y2, area, score;
  int64_t index;
};

template <typename scalar_t>
scalar_t iou(const Candidate<scalar_t>& a, const Candidate<scalar_t>& b) {
  const scalar_t zero = 0;
  const scalar_t width = std::max(std::min(a.x2, b.x2) - std::max(a.x1, b.x1), zero);
  const scalar_t height = std::max(std::min(a.y2, b.y2) - std::max(a.y1, b.y1), zero);
  const scalar_t intersection = width * height;
  const scalar_t joined = a.area + b.area - intersection;
  const scalar_t result = intersection / joined;
  return joined > zero && !std::isnan(result) ? result : zero;  // NaN fails the comparison
}

template <typename scalar_t>
scalar_t factor(scalar_t overlap, const Settings<scalar_t>& settings) {
  if (settings.method == Method::kGaussian) return std::exp(-(overlap * overlap) / settings.sigma);
  if (!(overlap > settings.iou_threshold)) return 1;
  // Plain NMS: a NaN score falls away whatever the minimum.
  return settings.method == Method::kLinear ? 1 - overlap
                                            : std::numeric_limits<scalar_t>::quiet_NaN();
}

// Takes the boxes of one class by falling score and writes what is left of their scores.
// `live` is in rising order of index and stays so, hence the first of equal scores is the lowest.
template <typename scalar_t>
void suppress_class(std::vector<Candidate<scalar_t>>& live, const Settings<scalar_t>& settings,
                    scalar_t* decayed) {
  const auto lower = [](const auto& a, const auto& b) { return a.score < b.score; };
  auto best = std::max_element(live.begin(), live.end(), lower);
  while (best != live.end()) {
    const Candidate<scalar_t> taken = *best;
    decayed[taken.index] = taken.score;
    size_t kept = 0, next = 0;
    for (const Candidate<scalar_t>& other : live) {
      if (other.index == taken.index) continue;
      Candidate<scalar_t> moved = other;
      moved.score *= factor(iou(taken, other), settings);
      if (!(moved.score >= settings.min_score)) continue;  // written so that NaN falls away
      live[kept] = moved;
      if (live[next].score < moved.score) next = kept;
      ++kept;
    }
    live.resize(kept);
    best = live.begin() + next;
  }
}

template <typename scalar_t>
std::vector<scalar_t> decay(const Tensor& boxes, const Tensor& scores, const int64_t* classes,
                            const Settings<scalar_t>& settings) {
  const int64_t n = scores.size(0);
  const scalar_t* box = boxes.const_data_ptr<scalar_t>();
  const scalar_t* score = scores.const_data_ptr<scalar_t>();
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return classes[a] < classes[b]; });
  std::vector<int64_t> starts;
  for (int64_t i = 0; i < n; ++i) {
    if (i == 0 || classes[order[i]] != classes[order[i - 1]]) starts.push_back(i);
  }
  starts.push_back(n);

  std::vector<scalar_t> decayed(n, -1);  // below any minimum: fell away
  const auto classes_found = static_cast<int64_t>(starts.size()) - 1;
  torch::stable::parallel_for(0, classes_found, 1, [&](int64_t begin, int64_t end) {
    std::vector<Candidate<scalar_t>> live;
    for (int64_t group = begin; group < end; ++group) {
      live.clear();
      for (int64_t i = starts[group]; i < starts[group + 1]; ++i) {
        const int64_t index = order[i];
        if (!(score[index] >= settings.min_score)) continue;
        const scalar_t* b = box + 4 * index;
        const scalar_t zero = 0;
        const scalar_t area = std::max(b[2] - b[0], zero) * std::max(b[3] - b[1], zero);
        live.push_back({b[0], b[1], b[2], b[3], area, score[index], index});
      }
      suppress_class(live, settings, decayed.data());
    }
  });
  return decayed;
}

template <typename scalar_t>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& boxes, const Tensor& scores,
                                       const Tensor& classes, const Settings<scalar_t>& settings) {
  const int64_t n = scores.size(0);
  constexpr ScalarType dtype = sizeof(scalar_t) == 8 ? ScalarType::Double : ScalarType::Float;
  const std::vector<scalar_t> decayed = decay<scalar_t>(
      as(boxes, dtype), as(scores, dtype), classes.const_data_ptr<int64_t>(), settings);
  std::vector<int64_t> kept;
  for (int64_t i = 0; i < n; ++i) {
    if (decayed[i] >= settings.min_score) kept.push_back(i);
  }
  std::stable_sort(kept.begin(), kept.end(),
                   [&](int64_t a, int64_t b) { return decayed[a] > decayed[b]; });

  Tensor indices = torch::stable::new_empty(classes, {n});
  Tensor values = torch::stable::new_zeros(scores, {n}, dtype);
  torch::stable::fill_(indices, -1);
  std::copy(kept.begin(), kept.end(), indices.mutable_data_ptr<int64_t>());
  scalar_t* value = values.mutable_data_ptr<scalar_t>();
  for (size_t i = 0; i < kept.size(); ++i) value[i] = decayed[kept[i]];
  Tensor count = torch::stable::new_empty(classes, std::vector<int64_t>{});
  *count.mutable_data_ptr<int64_t>() = static_cast<int64_t>(kept.size());
  return {indices, as(values, scores.scalar_type()), count};
}

std::tuple<Tensor, Tensor, Tensor> soft_nms(const Tensor& boxes, const Tensor& scores,
                                            const Tensor& classes, double iou_threshold,
                                            std::string method, double sigma, double min_score) {
  check_floating("boxes", boxes, {-1, 4}, boxes);
  check_floating("scores", scores, {boxes.size(0)}, boxes);
  check_indices("classes", classes, boxes.size(0), boxes);
  D2DET_CHECK(min_score >= 0 && sigma > 0, "min_score must be at least 0 and sigma above 0");
  const Tensor ids = as(classes, ScalarType::Long);
  const Method parsed = parse_method(method);
  if (boxes.scalar_type() == ScalarType::Double || scores.scalar_type() == ScalarType::Double) {
    return run<double>(boxes, scores, ids, {parsed, iou_threshold, sigma, min_score});
  }
  return run<float>(boxes, scores, ids,
                    {parsed, static_cast<float>(iou_threshold), static_cast<float>(sigma),
                     static_cast<float>(min_score)});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2det, CPU, m) { m.impl("soft_nms", TORCH_BOX(&soft_nms)); }

}  // namespace d2det
