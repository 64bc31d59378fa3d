// The part of ONNX Runtime's C API that a CPU custom operator needs, stated without its headers.
//
// The API is a table of functions that is only ever appended to: a slot keeps its meaning in all later versions. All
// slots named here are there since ONNX Runtime 1.17 (API version 17). So is the record of a custom operator: a record
// says how many of its callbacks are filled in by the API version it was written for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace corral::ort {

struct Status;
struct Value;
struct TypeAndShape;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct CustomOpDomain;
struct InferContext;

using Function = void (*)();
using Table = const Function*;

struct ApiBase {
  Table (*api)(uint32_t version);
  const char* (*version_string)();
};

constexpr uint32_t kApiVersion = 17;

enum Slot : int {
  kCreateStatus = 0,
  kGetErrorMessage = 2,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kKernelInfoGetAttributeFloat = 85,
  kKernelInfoGetAttributeInt64 = 86,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseTensorTypeAndShape = 99,
  kKernelInfoGetInputCount = 230,
  kKernelInfoGetInputName = 232,
  kKernelInfoGetConstantInputTensor = 249,
  kKernelContextParallelFor = 274,
};

enum ElementType : int { kFloat = 1, kUint8 = 2, kInt64 = 7, kFloat16 = 10 };
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kRuntimeException = 6, kNotImplemented = 9 };

// What is thrown inside the library; it leaves as a Status.
struct Failure : std::runtime_error {
  ErrorCode code;
  Failure(ErrorCode code, const std::string& message) : std::runtime_error(message), code(code) {}
};

struct CustomOp {
  uint32_t version;
  void* (*create_before_16)(const CustomOp*, Table, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  ElementType (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  ElementType (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute_before_16)(void*, KernelContext*);
  void (*destroy)(void*);
  int (*input_kind)(const CustomOp*, size_t);
  int (*output_kind)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_least)(const CustomOp*);
  int (*variadic_input_alike)(const CustomOp*);
  int (*variadic_output_least)(const CustomOp*);
  int (*variadic_output_alike)(const CustomOp*);
  Status* (*create)(const CustomOp*, Table, const KernelInfo*, void**);
  Status* (*compute)(void*, KernelContext*);
  Status* (*infer_shape)(const CustomOp*, InferContext*);
  int (*first_version)(const CustomOp*);
  int (*last_version)(const CustomOp*);
  Function later[4];  // read from records of API version 18 on
};
static_assert(sizeof(CustomOp) == 26 * sizeof(void*), "the record of a custom operator has 26 words");

struct Tensor {
  ElementType type;
  std::vector<int64_t> shape;
  void* data;
};

// The table with names. Where ONNX Runtime answers with a Status, that is thrown as a Failure.
class Api {
 public:
  explicit Api(Table table) : table_(table) {}

  template <class Result, class... Arguments>
  Result call(Slot slot, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(table_[slot])(arguments...);
  }

  template <class... Arguments>
  void check(Slot slot, Arguments... arguments) const {
    Status* status = call<Status*>(slot, arguments...);
    if (!status) return;
    const std::string message = call<const char*>(kGetErrorMessage, static_cast<const Status*>(status));
    call<void>(kReleaseStatus, status);
    throw Failure(kFail, message);
  }

  Status* status(ErrorCode code, const char* message) const { return call<Status*>(kCreateStatus, int(code), message); }

  int64_t attribute(const KernelInfo* info, const char* name) const;
  float float_attribute(const KernelInfo* info, const char* name) const;
  Tensor constant(const KernelInfo* info, size_t input) const;  // refuses what is no constant initializer
  // Whether a node has this optional input.
  bool has_input(const KernelInfo* info, size_t index) const;
  bool has_input(KernelContext* context, size_t index) const;
  Tensor input(KernelContext* context, size_t index) const;
  // Null where a node leaves this optional output out.
  template <class T = float>
  T* output(KernelContext* context, const std::vector<int64_t>& shape, size_t index = 0) const {
    return static_cast<T*>(output_data(context, shape, index));
  }

 private:
  const Value* input_value(KernelContext* context, size_t index) const;
  void* output_data(KernelContext* context, const std::vector<int64_t>& shape, size_t index) const;
  Tensor tensor(const Value* value) const;

  Table table_;
};

// ONNX Runtime's own threads. `work` must not throw.
class Workers {
 public:
  Workers(const Api& api, const KernelContext* context) : api_(api), context_(context) {}

  template <class Work>
  void each(size_t count, const Work& work) const {
    if (count == 1) return work(0);
    const auto run = [](void* data, size_t i) noexcept { (*static_cast<const Work*>(data))(i); };
    void (*function)(void*, size_t) = run;
    api_.check(kKernelContextParallelFor, context_, function, count, count,
               const_cast<void*>(static_cast<const void*>(&work)));
  }

  // Here where `operations`, multiplications of the whole, take no longer than waking the other threads.
  template <class Work>
  void each_worth(size_t count, int64_t operations, const Work& work) const {
    if (operations > kWorthWaking) return each(count, work);
    for (size_t i = 0; i < count; i++) work(i);
  }

 private:
  static constexpr int64_t kWorthWaking = 1 << 17;

  const Api& api_;
  const KernelContext* context_;
};

}  // namespace corral::ort
