// One wheel runs on any x86-64 machine: the kernels in kernels.h are compiled once for each
// instruction set (isa_*.cpp), each time in a namespace of its own, and one is chosen at run time.

#pragma once

namespace d2det {

// In rising order: each includes the ones before it.
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// What this processor has, lowered by D2DET_CPU_CAPABILITY=portable|avx2|avx512 where that is set.
Isa cpu_isa();
const char* isa_name(Isa isa);

#if defined(__x86_64__)
#define D2DET_X86 1
// The address of `function` (a name, with template arguments if it has any) for this processor.
#define D2DET_SELECT_ISA(...)                                                           \
  (::d2det::cpu_isa() >= ::d2det::Isa::kAvx512Bf16 ? &::d2det::avx512_bf16::__VA_ARGS__ \
   : ::d2det::cpu_isa() == ::d2det::Isa::kAvx512   ? &::d2det::avx512::__VA_ARGS__      \
   : ::d2det::cpu_isa() == ::d2det::Isa::kAvx2     ? &::d2det::avx2::__VA_ARGS__        \
                                                   : &::d2det::portable::__VA_ARGS__)
// Repeats a declaration for each instruction set: D2DET_FOR_EACH_ISA(void f(int);)
#define D2DET_FOR_EACH_ISA(...) \
  namespace portable {          \
  __VA_ARGS__                   \
  }                             \
  namespace avx2 {              \
  __VA_ARGS__                   \
  }                             \
  namespace avx512 {            \
  __VA_ARGS__                   \
  }                             \
  namespace avx512_bf16 {       \
  __VA_ARGS__                   \
  }
#else
#define D2DET_X86 0
#define D2DET_SELECT_ISA(...) (&::d2det::portable::__VA_ARGS__)
#define D2DET_FOR_EACH_ISA(...) \
  namespace portable {          \
  __VA_ARGS__                   \
  }
#endif

}  // namespace d2det
