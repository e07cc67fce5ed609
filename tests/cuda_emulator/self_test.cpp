// Small kernels with and without mistakes, for tests/ops/test_cuda_emulator.py: it shows that the
// emulator runs what is right and reports what is wrong.

#include <string>

#include "cuda/device.cuh"

namespace d2det {
namespace {

// Each block writes the sum of its part of `input`, through shared memory and warps.
__global__ void block_sums(const float* input, float* output, int64_t count, bool synchronise) {
  __shared__ float sums[32];
  D2DET_DYNAMIC_SHARED(float, staged);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  staged[threadIdx.x] = index < count ? input[index] : 0.0f;
  if (synchronise) __syncthreads();
  const float sum = warp_sum(staged[blockDim.x - 1 - threadIdx.x]);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned i = 0; i < blockDim.x / 32; ++i) total += sums[i];
    output[blockIdx.x] = total;
  }
}

__global__ void collectives(float* output) {
  const int lane = threadIdx.x % 32;
  const float value = static_cast<float>(threadIdx.x);
  float result = 0;
  if (blockIdx.x == 0) result = __shfl_sync(kFullWarp, value, 3);
  if (blockIdx.x == 1) result = __shfl_up_sync(kFullWarp, value, 2, 8);
  if (blockIdx.x == 2) result = __shfl_down_sync(kFullWarp, value, 2, 8);
  if (blockIdx.x == 3) result = __shfl_xor_sync(kFullWarp, value, 5);
  if (blockIdx.x == 4) result = static_cast<float>(__popc(__ballot_sync(kFullWarp, lane < 5)));
  if (blockIdx.x == 5) result = static_cast<float>(__syncthreads_count(threadIdx.x < 40));
  if (blockIdx.x == 6) {
    // The halves of a warp apart from each other.
    const uint32_t half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    result = lane < 16 ? __shfl_sync(half, value, 0, 16) : __shfl_sync(half, value, 1, 16);
  }
  output[blockIdx.x * blockDim.x + threadIdx.x] = result;
}

__global__ void mistake(int kind, float* output) {
  D2DET_DYNAMIC_SHARED(float, staged);
  if (kind == 0 && threadIdx.x < 40) __syncthreads();  // not all of the block
  if (kind == 1 && threadIdx.x < 3) __syncwarp();      // not all of the warp
  if (kind == 2) staged[blockDim.x + threadIdx.x] = 1;
  if (kind == 3) load_vector<4>(output + 1);
  if (kind == 4) {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (kind == 5) output[threadIdx.x] = staged[threadIdx.x];  // never written
}

Tensor self_test(const Tensor& input, int64_t kind) {
  const int64_t count = input.size(0);
  const float* values = input.const_data_ptr<float>();
  if (kind == -1 || kind == -2) {
    const auto blocks = static_cast<unsigned>(ceil_div(count, 64));
    Tensor output = torch::stable::new_empty(input, {blocks});
    D2DET_LAUNCH(block_sums, blocks, 64, 64 * sizeof(float), nullptr, values,
                 output.mutable_data_ptr<float>(), count, kind == -1);
    return output;
  }
  Tensor output = torch::stable::new_zeros(input, {7 * 64});
  if (kind == -3) {
    D2DET_LAUNCH(collectives, 7, 64, 0, nullptr, output.mutable_data_ptr<float>());
  } else {
    D2DET_LAUNCH(mistake, 2, kind == 6 ? 2048 : 64, 64 * sizeof(float), nullptr,
                 static_cast<int>(kind), output.mutable_data_ptr<float>());
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(d2det_emulated, m) {
  m.def("self_test(Tensor input, int kind) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(d2det_emulated, CPU, m) { m.impl("self_test", TORCH_BOX(&self_test)); }

}  // namespace d2det
