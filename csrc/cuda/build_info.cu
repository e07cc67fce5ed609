// What the kernels for CUDA were built with; see ../build_info.cpp.

#include <cuda_runtime_api.h>

#define D2DET_TEXT_OF(...) #__VA_ARGS__
#define D2DET_TEXT(...) D2DET_TEXT_OF(__VA_ARGS__)

extern "C" __attribute__((visibility("default"))) const char* d2det_build_info() {
  return "cuda: " D2DET_TEXT(CUDART_VERSION) "\n"  // 1000 * major + 10 * minor
         "architectures: " D2DET_TEXT(D2DET_CUDA_ARCHITECTURES) "\n";
}
