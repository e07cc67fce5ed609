// Lets the kernels of csrc/cuda run on a CPU, so that they are tested where there is no GPU: the
// .cu files are compiled as C++ with -DD2DET_EMULATE_CUDA, and csrc/cuda/device.cuh includes this
// header in place of CUDA's. README.md says what it checks and what it cannot.

#pragma once

#include "atomics.h"
#include "builtins.h"
#include "runtime.h"
#include "scheduler.h"
#include "warp.h"
