// The kernels for processors with AVX2 and FMA.

#include "simd.h"

#if D2DET_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif

#define D2DET_ISA avx2
#define D2DET_VECTOR_BYTES 32
#define D2DET_BF16_DOT 0
#include "simd_vector.h"
// clang-format: simd_vector.h comes first
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
