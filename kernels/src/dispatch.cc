#include "dispatch.h"

#include <cstdlib>
#include <string>

#include "ort_api.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace corral {
namespace {

#if defined(__aarch64__)
bool has_dotprod() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
  return true;  // every one that runs macOS
#else
  return false;
#endif
}
#endif

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
#elif defined(__aarch64__)
    {"neon_dotprod", &kNeonDotprod, has_dotprod},
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
