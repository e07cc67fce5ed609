// The kernels for processors with AVX-512 and its bfloat16 dot product.

#include "simd.h"

#if D2DET_X86
#if defined(__clang__)
#pragma clang attribute push(                                                             \
    __attribute__((                                                                       \
        target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2"))), \
    apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")
#endif

#define D2DET_ISA avx512_bf16
#define D2DET_VECTOR_BYTES 64
#define D2DET_BF16_DOT 1
#include "simd_vector.h"
// clang-format: simd_vector.h comes first
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
