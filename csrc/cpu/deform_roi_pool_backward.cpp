// Deformable RoI pooling on CPU, backward. Each thread owns a block of channels and goes through
// the RoIs in order, so that sums need no atomics and come out the same in every run.

#include <cstring>

#include "deform_roi_pool_batches.h"

namespace d2det {
namespace {

// Channels [first, first + some) of a group's map, split between the threads.
struct Blocks {
  int64_t width, count;
  Blocks(int64_t channels, int64_t threads) {
    const int64_t share = (channels + threads - 1) / threads;
    width = (share + kRoiChannels - 1) / kRoiChannels * kRoiChannels;
    count = (channels + width - 1) / width;
  }
};

// Channels of a map whose rows a thread works on at a time: two cache lines for each pixel, fewer
// where threads would be left without work.
template <typename T>
int64_t block_channels(int64_t channels, int64_t threads) {
  const int64_t wanted = std::max<int64_t>(128 / sizeof(T), kRoiChannels);
  return channels < wanted * threads ? kRoiChannels : wanted;
}

template <typename T>
class Backward {
 public:
  Backward(const RoiArguments& args, const Tensor& grad_output, const std::vector<Tensor>& grads,
           T* grad_offset, T* grad_modulation)
      : args_(args),
        groups_(group_rois(args)),
        planner_(args, groups_, /*with_slopes=*/grad_offset || grad_modulation),
        grads_(grads),
        grad_offset_(grad_offset),
        grad_modulation_(grad_modulation),
        threads_(torch::stable::get_num_threads()),
        format_(format_of(grad_output)),
        grad_(as(grad_output,
                 args.accumulation() == ScalarType::Double ? ScalarType::Double
                                                           : grad_output.scalar_type(),
                 format_)),
        source_(roi_tensor(grad_, format_)) {}

  void run() {
    if (grads_.empty() && !dots()) return;
    clear_unused();
    std::optional<Tensor> features;
    int64_t level = -1;
    for (const RoiGroup& group : groups_) {
      const Tensor& map = args_.features[group.level];
      if (level != group.level) {
        features = as(map, map.scalar_type(), format_of(map));
        rows_.reset();
        level = group.level;
      }
      run_group(group, *features, format_of(map));
    }
  }

 private:
  bool dots() const { return grad_offset_ || grad_modulation_; }

  void run_group(const RoiGroup& group, const Tensor& features, MemoryFormat format) {
    const RoiBatch<T> batch = planner_.plan(group);
    const Pixels map = pixels_of(features, format, group.image);
    Pixels grad_map = map;
    if (!grads_.empty()) grad_map = pixels_of(grads_[group.level], format, group.image);
    // Sums of each thread's channels, added in the order of the threads.
    const int64_t count = dots() ? batch.count * batch.bins() * 3 : 0;
    sums_.assign(static_cast<size_t>(count * threads_), T(0));
    if (is_rows<T>(features, format)) {
      T* grads = grads_.empty() ? nullptr : static_cast<T*>(grad_map.data);
      if (grads) clear(grads_[group.level], group.image);
      scatter(batch, static_cast<const T*>(map.data), grads, args_.channels(), 0, args_.channels());
    } else {
      run_copied(batch, features, map, grad_map);
    }
    if (dots()) add_sums(batch, group);
  }

  // Through rows of channels. A thread takes its share of the channels a block at a time: the rows
  // of a block stay in its cache, and hold a pixel's features and their gradient side by side.
  void run_copied(const RoiBatch<T>& batch, const Tensor& features, const Pixels& map,
                  const Pixels& grad_map) {
    const int64_t height = features.size(2), width = features.size(3);
    const int64_t channels = args_.channels(), block = block_channels<T>(channels, threads_);
    const int64_t blocks = (channels + block - 1) / block, shares = std::min(threads_, blocks);
    const bool reads = dots(), writes = !grads_.empty();
    const int64_t stride = reads && writes ? 2 * block : block;
    const int64_t size = height * width * stride;
    if (!rows_) {
      rows_.emplace(shares * size);
      use_large_pages(rows_->get(), shares * size * static_cast<int64_t>(sizeof(T)));
    }
    const std::vector<RowSpan> spans = rows_read(batch);
    const auto fill = D2DET_SELECT_ISA(fill_rows<T>);
    const auto drain = D2DET_SELECT_ISA(drain_rows<T>);
    const auto kernel = D2DET_SELECT_ISA(scatter_rois<T>);
    torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
      const Scratch<T> tile(batch.bins() * block);
      for (int64_t share = begin; share < end; ++share) {
        T* rows = rows_->get() + share * size;
        T* grad_rows = rows + stride - block;
        const RoiMap<T> both{reads ? rows : nullptr, writes ? grad_rows : nullptr, stride};
        for (int64_t b = blocks * share / shares; b < blocks * (share + 1) / shares; ++b) {
          const int64_t first = b * block, some = std::min(block, channels - first);
          for (int64_t y = 0; y < height; ++y) {
            const RowSpan span = spans[y];
            const int64_t at = y * width + span.begin;
            if (reads && span.begin < span.end) {
              fill(map, first, some, at, span.end - span.begin, rows + at * stride, stride);
            }
            for (int64_t x = 0; writes && x < width; ++x) {
              std::memset(grad_rows + (y * width + x) * stride, 0, block * sizeof(T));
            }
          }
          kernel(batch, both, source_, first, some, sums_of(share), tile.get());
          if (writes) drain(grad_rows, stride, grad_map, first, some, 0, height * width);
        }
      }
    });
  }

  void scatter(const RoiBatch<T>& batch, const T* rows, T* grad_rows, int64_t stride, int64_t first,
               int64_t channels) {
    const auto kernel = D2DET_SELECT_ISA(scatter_rois<T>);
    const Blocks blocks(channels, threads_);
    const T* features = dots() ? rows : nullptr;
    torch::stable::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
      const Scratch<T> tile(batch.bins() * blocks.width);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t c = b * blocks.width;
        const RoiMap<T> map{features ? features + c : nullptr, grad_rows ? grad_rows + c : nullptr,
                            stride};
        kernel(batch, map, source_, first + c, std::min(blocks.width, channels - c), sums_of(b),
               tile.get());
      }
    });
  }

  T* sums_of(int64_t share) {
    return sums_.data() + share * (static_cast<int64_t>(sums_.size()) / threads_);
  }

  // From sums over channels to the gradients of offset and modulation.
  void add_sums(const RoiBatch<T>& batch, const RoiGroup& group) {
    torch::stable::parallel_for(0, batch.count, 4, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) add_sums_of(batch, q, group.members[q]);
    });
  }

  void add_sums_of(const RoiBatch<T>& batch, int64_t q, int64_t r) {
    const int64_t bins = batch.bins(), count = batch.count * bins * 3;
    const T* roi = batch.rois + 5 * r;
    const RoiSpan<T> x = roi_span(roi[1], roi[3], batch.scale, batch.convention);
    const RoiSpan<T> y = roi_span(roi[2], roi[4], batch.scale, batch.convention);
    for (int64_t bin = 0; bin < bins; ++bin) {
      T sums[3] = {};
      for (int64_t b = 0; b < threads_; ++b) {
        const T* part = sums_.data() + b * count + (q * bins + bin) * 3;
        for (int i = 0; i < 3; ++i) sums[i] += part[i];
      }
      if (grad_modulation_) grad_modulation_[r * bins + bin] = sums[0];
      if (!grad_offset_) continue;
      const T scale = batch.modulation ? batch.modulation[r * bins + bin] : T(1);
      grad_offset_[r * 2 * bins + bin] = sums[1] * scale * x.extent * batch.gamma;
      grad_offset_[(r * 2 + 1) * bins + bin] = sums[2] * scale * y.extent * batch.gamma;
    }
  }

  // Maps of images and levels without a RoI are not visited: their gradient is zero.
  void clear_unused() {
    std::vector<bool> used(grads_.size() * static_cast<size_t>(args_.images()), false);
    for (const RoiGroup& group : groups_) {
      if (!grads_.empty()) used[group.level * args_.images() + group.image] = true;
    }
    for (size_t i = 0; i < used.size(); ++i) {
      if (!used[i]) clear(grads_[i / args_.images()], i % args_.images());
    }
  }

  // Image `n` of a gradient, in either memory format.
  static void clear(const Tensor& grad, int64_t n) {
    char* data = static_cast<char*>(pixels_of(grad, MemoryFormat::Contiguous, n).data);
    const int64_t bytes =
        grad.size(1) * grad.size(2) * grad.size(3) * static_cast<int64_t>(grad.element_size());
    torch::stable::parallel_for(0, bytes, 1 << 18, [&](int64_t begin, int64_t end) {
      std::memset(data + begin, 0, static_cast<size_t>(end - begin));
    });
  }

  const RoiArguments& args_;
  std::vector<RoiGroup> groups_;
  RoiPlanner<T> planner_;
  const std::vector<Tensor>& grads_;
  T* grad_offset_;
  T* grad_modulation_;
  int64_t threads_;
  MemoryFormat format_;
  Tensor grad_;
  RoiTensor source_;
  std::optional<Scratch<T>> rows_;
  std::vector<T> sums_;
};

template <typename T>
void run(const RoiArguments& args, const Tensor& grad_output, const std::vector<Tensor>& grads,
         const std::optional<Tensor>& grad_offset, const std::optional<Tensor>& grad_modulation) {
  const auto pointer = [](const std::optional<Tensor>& tensor) {
    return tensor ? tensor->mutable_data_ptr<T>() : nullptr;
  };
  Backward<T>(args, grad_output, grads, pointer(grad_offset), pointer(grad_modulation)).run();
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> deform_roi_pool_backward(
    const Tensor& grad_output, std::vector<Tensor> features, const Tensor& rois,
    const Tensor& levels, std::optional<Tensor> offset, std::optional<Tensor> modulation,
    int64_t output_size, std::vector<double> spatial_scales, int64_t sampling_ratio, double gamma,
    std::string convention, std::vector<bool> output_mask, bool /*deterministic: always*/) {
  const RoiArguments args{features,    rois,           levels,         offset, modulation,
                          output_size, spatial_scales, sampling_ratio, gamma,  convention};
  check_roi_arguments(args);
  check_floating("grad_output", grad_output,
                 {rois.size(0), args.channels(), output_size, output_size}, features[0]);
  D2DET_CHECK(grad_output.scalar_type() == features[0].scalar_type(),
              "grad_output must have the dtype of features");
  D2DET_CHECK(output_mask.size() == 3, "output_mask must have 3 entries");
  const ScalarType type = args.accumulation();
  std::vector<GradientTensor> maps;
  std::vector<Tensor> grads;
  if (output_mask[0]) {
    for (const Tensor& map : features) {
      grads.push_back(maps.emplace_back(map, map.scalar_type(), format_of(map)).work);
    }
  }
  std::optional<GradientTensor> shifts, scales;
  std::optional<Tensor> grad_offset, grad_modulation;
  if (output_mask[1] && offset) {
    grad_offset = shifts.emplace(*offset, type, MemoryFormat::Contiguous).work;
  }
  if (output_mask[2] && modulation) {
    grad_modulation = scales.emplace(*modulation, type, MemoryFormat::Contiguous).work;
  }
  if (type == ScalarType::Double) {
    run<double>(args, grad_output, grads, grad_offset, grad_modulation);
  } else {
    run<float>(args, grad_output, grads, grad_offset, grad_modulation);
  }
  std::vector<Tensor> results;
  for (GradientTensor& map : maps) results.push_back(map.finish());
  return {results, shifts ? shifts->finish() : torch::stable::new_empty(rois, {0}),
          scales ? scales->finish() : torch::stable::new_empty(rois, {0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2det, CPU, m) {
  m.impl("deform_roi_pool_backward", TORCH_BOX(&deform_roi_pool_backward));
}

}  // namespace d2det
