// A kernel class -> ONNX Runtime's record of a custom operator. A kernel has a name, the types of its inputs and outputs, and
//
//   Kernel(const ort::Api&, const ort::KernelInfo*)      checks attributes and weights, when a session is opened
//   void compute(const ort::Api&, ort::KernelContext*)   one call; may be called by several threads at once
//
// Both throw ort::Failure; nothing else leaves the library, and nothing is thrown across its border.
#pragma once

#include <exception>
#include <iterator>
#include <new>
#include <string>

#include "ort_api.h"

namespace corral {

struct Port {
  constexpr Port(ort::ElementType type, bool optional = false) : type(type), optional(optional) {}
  ort::ElementType type;
  bool optional;  // a node may leave it out
};

template <class Kernel>
class Operator {
 public:
  static const ort::CustomOp* record() {
    static const ort::CustomOp op = [] {
      ort::CustomOp record{};
      record.version = ort::kApiVersion;
      record.name = [](const ort::CustomOp*) { return Kernel::kName; };
      record.provider = [](const ort::CustomOp*) -> const char* { return nullptr; };  // the CPU
      record.input_count = [](const ort::CustomOp*) { return std::size(Kernel::kInputs); };
      record.input_type = [](const ort::CustomOp*, size_t i) { return Kernel::kInputs[i].type; };
      record.output_count = [](const ort::CustomOp*) { return std::size(Kernel::kOutputs); };
      record.output_type = [](const ort::CustomOp*, size_t i) { return Kernel::kOutputs[i].type; };
      record.input_kind = [](const ort::CustomOp*, size_t i) { return int(Kernel::kInputs[i].optional); };
      record.output_kind = [](const ort::CustomOp*, size_t i) { return int(Kernel::kOutputs[i].optional); };
      record.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
      record.create = create;
      record.compute = compute;
      record.destroy = [](void* self) { delete static_cast<Self*>(self); };
      record.first_version = [](const ort::CustomOp*) { return 1; };
      record.last_version = [](const ort::CustomOp*) { return 0x7fffffff; };
      return record;
    }();
    return &op;
  }

 private:
  struct Self {
    ort::Api api;
    Kernel kernel;
  };

  static ort::Status* create(const ort::CustomOp*, ort::Table table, const ort::KernelInfo* info, void** self) {
    const ort::Api api(table);
    return guard(api, [&] { *self = new Self{api, Kernel(api, info)}; });
  }

  static ort::Status* compute(void* self, ort::KernelContext* context) {
    const Self& mine = *static_cast<const Self*>(self);
    return guard(mine.api, [&] { mine.kernel.compute(mine.api, context); });
  }

  template <class Work>
  static ort::Status* guard(const ort::Api& api, const Work& work) {
    try {
      work();
      return nullptr;
    } catch (const ort::Failure& failure) {
      return api.status(failure.code, (std::string(Kernel::kName) + ": " + failure.what() + ".").c_str());
    } catch (const std::bad_alloc&) {
      return api.status(ort::kRuntimeException, "failed to allocate memory for the activations of corral's CPU kernels.");
    } catch (const std::exception& error) {
      return api.status(ort::kRuntimeException, error.what());
    }
  }
};

}  // namespace corral
