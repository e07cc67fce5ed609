// Soft-NMS on CPU: classes in parallel, one vectorised pass over a class's remaining boxes for each
// one taken.

#include "soft_nms.h"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "../soft_nms_arguments.h"
#include "pixels.h"

namespace d2det {
namespace {

// Memory for the boxes of one class.
template <typename scalar_t>
class ClassBoxes {
 public:
  explicit ClassBoxes(int64_t most)
      : room_((most + kNmsRoom - 1) / kNmsRoom * kNmsRoom), fields_(6 * room_), index_(room_) {}

  void clear() {
    boxes_ = {field(0), field(1), field(2), field(3), field(4), field(5), index_.get(), 0};
  }

  void add(const scalar_t* box, scalar_t score, int64_t index) {
    const int64_t i = boxes_.count++;
    const scalar_t zero = 0;
    boxes_.x1[i] = box[0];
    boxes_.y1[i] = box[1];
    boxes_.x2[i] = box[2];
    boxes_.y2[i] = box[3];
    boxes_.area[i] = std::max(box[2] - box[0], zero) * std::max(box[3] - box[1], zero);
    boxes_.score[i] = score;
    boxes_.index[i] = index;
  }

  const NmsBoxes<scalar_t>& boxes() const { return boxes_; }

 private:
  scalar_t* field(int64_t i) const { return fields_.get() + i * room_; }

  int64_t room_;
  Scratch<scalar_t> fields_;
  Scratch<int64_t> index_;
  NmsBoxes<scalar_t> boxes_{};
};

template <typename scalar_t>
std::vector<scalar_t> decay(const Tensor& boxes, const Tensor& scores, const int64_t* classes,
                            const NmsSettings<scalar_t>& settings) {
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
  int64_t most = 0;
  for (int64_t i = 0; i < classes_found; ++i) most = std::max(most, starts[i + 1] - starts[i]);
  const auto kernel = D2DET_SELECT_ISA(suppress_class<scalar_t>);
  torch::stable::parallel_for(0, classes_found, 1, [&](int64_t begin, int64_t end) {
    ClassBoxes<scalar_t> live(most);
    for (int64_t group = begin; group < end; ++group) {
      live.clear();
      for (int64_t i = starts[group]; i < starts[group + 1]; ++i) {
        const int64_t index = order[i];
        if (score[index] >= settings.min_score) live.add(box + 4 * index, score[index], index);
      }
      kernel(live.boxes(), settings, decayed.data());
    }
  });
  return decayed;
}

template <typename scalar_t>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& boxes, const Tensor& scores,
                                       const Tensor& classes,
                                       const NmsSettings<scalar_t>& settings) {
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
  const NmsSettings<double> settings =
      check_soft_nms(boxes, scores, classes, iou_threshold, method, sigma, min_score);
  const Tensor ids = as(classes, ScalarType::Long);
  return with_nms_settings(boxes, scores, settings,
                           [&](const auto& own) { return run(boxes, scores, ids, own); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2det, CPU, m) { m.impl("soft_nms", TORCH_BOX(&soft_nms)); }

}  // namespace d2det
