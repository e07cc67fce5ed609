// The kernels for any processor: what the compiler's own target has (SSE2 on x86-64, NEON on Arm).

#include "simd.h"

#define D2DET_ISA portable
#define D2DET_VECTOR_BYTES 16
#define D2DET_BF16_DOT 0
#include "simd_vector.h"
// clang-format: simd_vector.h comes first
#include "kernels.h"
