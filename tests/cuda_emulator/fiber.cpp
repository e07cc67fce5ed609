#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

// What a function must keep for its caller goes on the stack, then the stacks are exchanged.
// swapcontext() would do the same, with two system calls for the signal mask.
#if defined(__x86_64__)
asm(R"(
.text
.type d2det_emulator_switch, @function
.hidden d2det_emulator_switch
.globl d2det_emulator_switch
d2det_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size d2det_emulator_switch, .-d2det_emulator_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.type d2det_emulator_switch, %function
.hidden d2det_emulator_switch
.globl d2det_emulator_switch
d2det_emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size d2det_emulator_switch, .-d2det_emulator_switch
)");
#else
#error "the emulator switches fibers on x86-64 and aarch64 only"
#endif

extern "C" void d2det_emulator_switch(void** from, void* to);

namespace emu {

Stacks::~Stacks() {
  if (memory_ != nullptr) munmap(memory_, count_ * kBytes);
}

void Stacks::reserve(size_t count) {
  if (count <= count_) return;
  if (memory_ != nullptr) munmap(memory_, count_ * kBytes);
  // Pages are taken when they are first written to.
  void* memory = mmap(nullptr, count * kBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of a block");
  memory_ = static_cast<unsigned char*>(memory);
  count_ = count;
}

unsigned char* Stacks::at(size_t index) { return memory_ + index * kBytes; }

void prepare(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack, bytes);  // of a kernel that was given up
#endif
  const auto top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
#if defined(__x86_64__)
  // Six registers, then the address to return to; at a function's entry the stack pointer is 8
  // short of a multiple of 16.
  auto* frame = reinterpret_cast<void**>(top) - 8;
  std::memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(entry);
#else
  auto* frame = reinterpret_cast<void**>(top) - 20;
  std::memset(frame, 0, 20 * sizeof(void*));
  frame[11] = reinterpret_cast<void*>(entry);  // x30, the address to return to
#endif
  context.stack_pointer = frame;
}

void switch_to(Context& from, Context& to) {
  d2det_emulator_switch(&from.stack_pointer, to.stack_pointer);
}

}  // namespace emu
