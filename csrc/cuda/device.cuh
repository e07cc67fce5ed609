// What every CUDA file uses of CUDA and of torch's CUDA side: launches that are checked, the
// current stream, shared memory, conversions, vectors. With D2DET_EMULATE_CUDA the same files are
// compiled for the CPU, as operators of another namespace, for tests (tests/cuda_emulator).

#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "../tensor.h"

#if defined(D2DET_EMULATE_CUDA)
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

namespace d2det {

// ---- Host: device, stream, launch ----

#if defined(D2DET_EMULATE_CUDA)

#define D2DET_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(d2det_emulated, CPU, m)
#define D2DET_DEVICE_GUARD(tensor) static_cast<void>(tensor)
#define D2DET_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emu::dynamic_shared())

inline cudaStream_t current_stream(const Tensor&) { return nullptr; }

#define D2DET_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                     \
  do {                                                                                   \
    const dim3 d2det_grid = (grid);                                                      \
    static_cast<void>(stream);                                                           \
    if (!::d2det::is_empty(d2det_grid)) {                                                \
      const auto d2det_arguments = std::make_tuple(__VA_ARGS__);                         \
      emu::launch(#kernel, d2det_grid, (block), static_cast<size_t>(shared_bytes), [&] { \
        std::apply([&](auto... values) { kernel(values...); }, d2det_arguments);         \
      });                                                                                \
    }                                                                                    \
  } while (false)

#else

#define D2DET_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(d2det, CUDA, m)
#define D2DET_DEVICE_GUARD(tensor) \
  const torch::stable::accelerator::DeviceGuard d2det_guard((tensor).get_device_index())
// One array for all: declarations of different types under one name would clash.
extern __shared__ __align__(128) unsigned char d2det_dynamic_shared[];
#define D2DET_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(::d2det::d2det_dynamic_shared)

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  const auto code = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
  D2DET_CHECK(code == AOTI_TORCH_SUCCESS, "torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Launches `kernel`, which stands in parentheses where it has template arguments:
// D2DET_LAUNCH((scale<float, 4>), blocks, 256, 0, stream, input, output, count).
#define D2DET_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                          \
  do {                                                                                        \
    const dim3 d2det_grid = (grid);                                                           \
    const auto d2det_shared = static_cast<size_t>(shared_bytes);                              \
    if (!::d2det::is_empty(d2det_grid)) {                                                     \
      auto* const d2det_kernel = kernel;                                                      \
      if (d2det_shared > ::d2det::kSharedBytesByDefault) {                                    \
        ::d2det::check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(d2det_kernel), \
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, \
                                                 static_cast<int>(d2det_shared)),             \
                            #kernel);                                                         \
      }                                                                                       \
      d2det_kernel<<<d2det_grid, (block), d2det_shared, (stream)>>>(__VA_ARGS__);             \
      ::d2det::check_cuda(cudaGetLastError(), #kernel);                                       \
    }                                                                                         \
  } while (false)

#endif

constexpr size_t kSharedBytesByDefault = 48 * 1024;  // more must be asked for
constexpr int64_t kMaxGridY = 65535;                 // of y and z; x may have 2^31 - 1

inline bool is_empty(dim3 grid) { return grid.x == 0 || grid.y == 0 || grid.z == 0; }

inline void check_cuda(cudaError_t error, const char* what) {
  D2DET_CHECK(error == cudaSuccess, "CUDA error in ", what, ": ", cudaGetErrorString(error));
}

inline int multiprocessor_count(const Tensor& tensor) {
  int count = 1;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount,
                                    std::max(0, static_cast<int>(tensor.get_device_index()))),
             "cudaDeviceGetAttribute");
  return count;
}

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

// Blocks for one thread an item, for kernels that go through the items with D2DET_GRID_STRIDE.
inline unsigned grid_for(int64_t items, int64_t threads) {
  return static_cast<unsigned>(std::min<int64_t>(ceil_div(items, threads), 1 << 20));
}

#define D2DET_GRID_STRIDE(index, count)                                             \
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, \
               d2det_step = static_cast<int64_t>(gridDim.x) * blockDim.x;           \
       index < (count); index += d2det_step)

// Calls f(T{}) with the element type of a floating-point tensor.
template <typename F>
void dispatch_floating(ScalarType type, F f) {
  switch (type) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      fail("floating-point tensors are needed, got ", torch::headeronly::toString(type));
  }
}

// ---- Device: numbers ----
// Elements are torch's Half and BFloat16, which are bit for bit CUDA's __half and __nv_bfloat16.

// The type that coordinates and sums are computed in.
template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
__host__ __device__ __forceinline__ Accumulate<T> to_float(T value) {
  return static_cast<Accumulate<T>>(value);
}

template <typename T>
__host__ __device__ __forceinline__ T from_float(Accumulate<T> value) {
  return static_cast<T>(value);
}

// N elements that are read and written as one.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T data[N];
};

template <typename T>
constexpr int kVectorSize = 16 / sizeof(T);  // elements in the widest access

template <typename T, int N>
__device__ __forceinline__ void check_alignment([[maybe_unused]] const T* address) {
#if defined(D2DET_EMULATE_CUDA)
  if (reinterpret_cast<uintptr_t>(address) % (sizeof(T) * N) != 0) {
    emu::fail("a vector at an address that is no multiple of its size", emu::Site::here());
  }
#endif
}

// N * sizeof(T) must be 1, 2, 4, 8 or 16, and `address` a multiple of it.
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* address) {
  check_alignment<T, N>(address);
  return *reinterpret_cast<const Vector<T, N>*>(address);
}

template <int N, typename T>
__device__ __forceinline__ void store_vector(T* address, const Vector<T, N>& value) {
  check_alignment<T, N>(address);
  *reinterpret_cast<Vector<T, N>*>(address) = value;
}

// As load_vector, of memory that nobody writes during the kernel.
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_constant(const T* address) {
#if defined(D2DET_EMULATE_CUDA)
  return load_vector<N>(address);
#else
  Vector<T, N> result;
  if constexpr (sizeof(result) == 16) {
    *reinterpret_cast<uint4*>(&result) = __ldg(reinterpret_cast<const uint4*>(address));
  } else if constexpr (sizeof(result) == 8) {
    *reinterpret_cast<uint2*>(&result) = __ldg(reinterpret_cast<const uint2*>(address));
  } else if constexpr (sizeof(result) == 4) {
    *reinterpret_cast<unsigned*>(&result) = __ldg(reinterpret_cast<const unsigned*>(address));
  } else {
    result = *reinterpret_cast<const Vector<T, N>*>(address);
  }
  return result;
#endif
}

// Whether all of these are multiples of 16 bytes.
inline bool aligned16(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// ---- Device: warps and atomics ----

constexpr uint32_t kFullWarp = 0xffffffffu;

// The sum over a warp, in every lane, in an order that is always the same.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kFullWarp, value, lanes);
  return value;
}

template <typename T>
__device__ __forceinline__ void atomic_add(T* address, T value) {
  atomicAdd(address, value);
}

#if defined(D2DET_EMULATE_CUDA) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
constexpr bool kHasVectorAtomics = true;
#else
constexpr bool kHasVectorAtomics = false;
#endif

// Adds N neighbours in global memory, aligned as a whole; one instruction for four floats on
// compute capability 9.0.
template <int N, typename T>
__device__ __forceinline__ void atomic_add_vector(T* address, const T* values) {
  if constexpr (kHasVectorAtomics && std::is_same_v<T, float> && N % 4 == 0) {
#if defined(D2DET_EMULATE_CUDA) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
    check_alignment<T, 4>(address);
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      atomicAdd(reinterpret_cast<float4*>(address + i),
                make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]));
    }
#endif
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) atomicAdd(address + i, values[i]);
  }
}

}  // namespace d2det
