// What the kernels for CUDA were built with; see ../build_info.cpp.

#ifndef D2DET_CUDA_ARCHITECTURES
#define D2DET_CUDA_ARCHITECTURES unknown
#endif
#ifndef __CUDACC_VER_MAJOR__
#define __CUDACC_VER_MAJOR__ 0
#define __CUDACC_VER_MINOR__ 0
#endif

#define D2DET_TEXT_OF(...) #__VA_ARGS__
#define D2DET_TEXT(...) D2DET_TEXT_OF(__VA_ARGS__)

extern "C" __attribute__((visibility("default"))) const char* d2det_cuda_build_info() {
  return "cuda: " D2DET_TEXT(__CUDACC_VER_MAJOR__) "." D2DET_TEXT(__CUDACC_VER_MINOR__) "\n"
         "architectures: " D2DET_TEXT(D2DET_CUDA_ARCHITECTURES) "\n";
}
