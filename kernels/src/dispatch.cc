#include "dispatch.h"

#include <cstdlib>
#include <string>

#include "ort_api.h"

namespace corral {
namespace {

// Best first.
const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"avx512_vnni", &kAvx512Vnni,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
     }},
    {"avx2", &kAvx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"portable", &kPortable, [] { return true; }},
};

}  // namespace

const InstructionSet& choose_instruction_set() {
  const char* wanted = std::getenv(kInstructionSetVariable);
  const bool any = !wanted || !*wanted;
  std::string names;
  for (const InstructionSet& set : kInstructionSets) {
    if (!set.supported()) continue;
    if (any || std::string(wanted) == set.name) return set;
    names += std::string(names.empty() ? "" : ", ") + set.name;
  }
  throw ort::Failure(ort::kNotImplemented, std::string(kInstructionSetVariable) + " is \"" + wanted +
                                               "\"; this processor has kernels for " + names);
}

}  // namespace corral
