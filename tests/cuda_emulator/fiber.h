// Threads of control that switch by hand, without a system call.

#pragma once

#include <cstddef>
#include <memory>

namespace emu {

// Stacks for `count` fibers, kept for the next launch.
class Stacks {
 public:
  static constexpr size_t kBytes = size_t{256} << 10;
  ~Stacks();
  unsigned char* at(size_t index);
  void reserve(size_t count);

 private:
  unsigned char* memory_ = nullptr;
  size_t count_ = 0;
};

// Where a fiber that is not running will go on.
struct Context {
  void* stack_pointer = nullptr;
};

// Sets `context` up to call `entry()`, which must not return, on the given stack.
void prepare(Context& context, unsigned char* stack, size_t bytes, void (*entry)());

// Stops the caller, keeping its place in `from`, and goes on in `to`.
void switch_to(Context& from, Context& to);

}  // namespace emu
