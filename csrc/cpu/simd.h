// Vectors for the kernels, as wide as the instruction set that they are compiled for: written in
// the vector extensions of GCC and Clang, so that one text serves every instruction set.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../bilinear.h"
#include "isa.h"
