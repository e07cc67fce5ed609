// Runs a kernel: blocks one after the other, the threads of a block as fibers that give way at
// barriers and warp collectives only.

#pragma once

#include <cstddef>
#include <cstdint>

#include "builtins.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emu {

// Where in the source a thread waits; the default argument of every function that waits.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// What a warp collective gives and gets: 32 values of `size` bytes, by lane.
struct Exchange {
  uint32_t mask;
  const void* value;
  void* results;
  size_t size;
};

// Runs `body(context)` as every thread of the grid. Throws std::runtime_error, naming the kernel,
// for what would be an error or a hang on a GPU.
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
            void* context);

// From within a kernel only.
[[noreturn]] void fail(const char* message, Site site);
int wait_for_block(bool predicate, Site site);  // how many threads had a true predicate
void wait_for_warp(const Exchange& exchange, Site site);
unsigned char* dynamic_shared();
unsigned lane();

template <typename Body>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Body body) {
  launch(
      name, grid, block, shared_bytes, [](void* context) { (*static_cast<Body*>(context))(); },
      &body);
}

}  // namespace emu

inline void __syncthreads(emu::Site site = emu::Site::here()) { emu::wait_for_block(false, site); }
inline int __syncthreads_count(int predicate, emu::Site site = emu::Site::here()) {
  return emu::wait_for_block(predicate != 0, site);
}
inline int __syncthreads_or(int predicate, emu::Site site = emu::Site::here()) {
  return emu::wait_for_block(predicate != 0, site) > 0;
}
inline int __syncthreads_and(int predicate, emu::Site site = emu::Site::here()) {
  return emu::wait_for_block(predicate == 0, site) == 0;
}
