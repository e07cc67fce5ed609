// What adaptive_weighted_pool.cpp asks of its kernels.

#pragma once

#include "element.h"
#include "isa.h"

namespace d2det {

struct WeightedPool {
  int64_t height, width, pooled_height, pooled_width;
  int64_t kernel_size, stride, padding;
  double coefficient;
  bool normalize;
};

// Numbers of scratch memory for each pixel and for each pooled pixel: three and two vectors.
constexpr int64_t kWeightedPoolScratch = 3 * 64;
constexpr int64_t kWeightedPoolPooledScratch = 2 * 64;

// Pools `channels` channels of one RoI; a plane of another RoI is as good as another channel.
// `scratch` holds the bytes above for each pixel. Gradients with a null pointer are left out.
D2DET_FOR_EACH_ISA(template <typename T>
                   void weighted_pool(const WeightedPool& pool, const Pixels& features,
                                      const Pixels& logits, const Pixels& output, int64_t channels,
                                      T* scratch);
                   template <typename T>
                   void weighted_pool_backward(const WeightedPool& pool, const Pixels& grad_output,
                                               const Pixels& features, const Pixels& logits,
                                               const Pixels& grad_features,
                                               const Pixels& grad_logits, int64_t channels,
                                               T* scratch);)

}  // namespace d2det
