// What the library was built with, and which of its kernels this processor runs; read through
// ctypes by d2det/ops/_build_info.py, since it takes no tensor that an operator would dispatch on.

#include <torch/headeronly/version.h>

#include <exception>
#include <sstream>
#include <string>

#include "cpu/isa.h"

namespace d2det {
namespace {

std::string instruction_set() {
  try {
    return isa_name(cpu_isa());
  } catch (const std::exception& error) {  // D2DET_CPU_CAPABILITY names none
    return error.what();
  }
}

std::string describe() {
  std::ostringstream text;
  text << "torch: " << TORCH_VERSION << "\n";
#if defined(__VERSION__)
  text << "compiler: " << __VERSION__ << "\n";
#endif
  text << "instruction sets:";
#if D2DET_X86
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    text << " " << isa_name(isa);
  }
#else
  text << " " << isa_name(Isa::kPortable);
#endif
  text << "\ninstruction set: " << instruction_set() << "\n";
  return text.str();
}

}  // namespace
}  // namespace d2det

// One "name: value" a line.
extern "C" __attribute__((visibility("default"))) const char* d2det_build_info() {
  static const std::string text = d2det::describe();
  return text.c_str();
}
