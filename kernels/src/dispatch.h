// Which kernels this processor runs. Decided in a file that is compiled for the least processor, so that an older one
// gets to ask. The kernel files must define no inline function that other files define, too: the linker keeps one
// version of those, which may be the one with instructions that the processor lacks.
#pragma once

#include "kernels.h"

namespace corral {

// Environment variable that names the instruction set to use, for tests and for comparisons.
constexpr const char* kInstructionSetVariable = "CORRAL_CPU_OPS_ISA";

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

// The best that this processor has, or the one that the variable names. Throws ort::Failure where that is not known or
// not supported here.
const InstructionSet& choose_instruction_set();

}  // namespace corral
