// All that is compiled once for each instruction set; included by isa_*.cpp and by nothing else.
//
// No header of the standard library or of torch may be included from here, and none of their
// templates or inline functions used: the linker keeps one copy of such a function for the whole
// extension, and if that were the one compiled here, it would run on processors that lack these
// instructions. What kernels need of them is included by simd.h, ahead of the target pragma.

#include "adaptive_weighted_pool_kernel.h"
#include "deform_roi_pool_kernel.h"
// clang-format: the order of inclusion
#include "deform_roi_pool_backward_kernel.h"
#include "modulated_deform_conv2d_kernel.h"
#include "soft_nms_kernel.h"
