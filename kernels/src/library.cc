// What the library exports: ONNX Runtime's entry point, and two functions that say what it is without ONNX Runtime.
#include <cstdlib>
#include <mutex>

#include "dispatch.h"
#include "op_add_norm.h"
#include "op_attention.h"
#include "op_experts.h"
#include "op_feed_forward.h"
#include "op_matmul.h"
#include "operator.h"

#define CORRAL_EXPORT extern "C" __attribute__((visibility("default")))

namespace corral {
namespace {

// Of the operators and of the layout of their weights; equal to spec/cpu_ops.py's.
constexpr int kVersion = 3;
constexpr const char* kDomain = "corral.cpu";

bool new_enough(const char* version) {
  char* rest = nullptr;
  const long major = std::strtol(version, &rest, 10);
  const long minor = *rest == '.' ? std::strtol(rest + 1, nullptr, 10) : -1;
  return major == 1 && minor >= long(ort::kApiVersion);
}

// Sessions keep a pointer to the domain: it is made once and lives as long as the library.
ort::CustomOpDomain* domain(const ort::Api& api) {
  static std::mutex mutex;
  static ort::CustomOpDomain* made = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!made) {
    ort::CustomOpDomain* fresh = nullptr;
    api.check(ort::kCreateCustomOpDomain, kDomain, &fresh);
    for (const ort::CustomOp* op :
         {Operator<TiledMatMul>::record(), Operator<TiledFeedForward>::record(), Operator<TiledExperts>::record(), Operator<TiledMoE>::record(),
          Operator<Attention<FloatRows>>::record(), Operator<Attention<Int8Rows>>::record(),
          Operator<Attention<Int4Rows>>::record(), Operator<AddRmsNorm>::record()}) {
      api.check(ort::kCustomOpDomainAdd, fresh, op);
    }
    made = fresh;
  }
  return made;
}

}  // namespace
}  // namespace corral

CORRAL_EXPORT corral::ort::Status* RegisterCustomOps(corral::ort::SessionOptions* options,
                                                     const corral::ort::ApiBase* base) {
  using namespace corral;
  const char* version = base->version_string();
  if (!new_enough(version)) {
    const std::string message = std::string("corral's CPU kernels need ONNX Runtime 1.17 or a later 1.x; this is ") + version;
    return ort::Api(base->api(1)).status(ort::kFail, message.c_str());
  }
  const ort::Api api(base->api(ort::kApiVersion));
  try {
    choose_instruction_set();  // refuse now rather than at the first node
    api.check(ort::kAddCustomOpDomain, options, domain(api));
    return nullptr;
  } catch (const ort::Failure& failure) {
    return api.status(failure.code, failure.what());
  } catch (const std::exception& error) {
    return api.status(ort::kRuntimeException, error.what());
  }
}

CORRAL_EXPORT int corral_cpu_ops_version() { return corral::kVersion; }

// The name of the instruction set whose kernels would run, or what is wrong; valid until the thread's next call.
CORRAL_EXPORT const char* corral_cpu_ops_instruction_set() {
  thread_local std::string answer;
  try {
    answer = corral::choose_instruction_set().name;
  } catch (const std::exception& error) {
    answer = error.what();
  }
  return answer.c_str();
}
