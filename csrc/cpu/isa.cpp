#include "isa.h"

#include <cstdlib>
#include <string_view>

#include "../tensor.h"

namespace d2det {
namespace {

Isa detect() {
#if D2DET_X86
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return Isa::kPortable;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))) {
    return Isa::kAvx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kPortable;
#endif
}

Isa choose() {
  const Isa present = detect();
  const char* variable = std::getenv("D2DET_CPU_CAPABILITY");
  const std::string_view wanted = variable ? variable : "";
  if (wanted.empty()) return present;
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (wanted == isa_name(isa)) return isa < present ? isa : present;
  }
  fail("D2DET_CPU_CAPABILITY must be portable, avx2, avx512 or avx512_bf16, got ", wanted);
}

}  // namespace

Isa cpu_isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    default:
      return "portable";
  }
}

}  // namespace d2det
