#include "ort_api.h"

namespace corral::ort {

int64_t Api::attribute(const KernelInfo* info, const char* name) const {
  int64_t value = 0;
  check(kKernelInfoGetAttributeInt64, info, name, &value);
  return value;
}

Tensor Api::constant(const KernelInfo* info, size_t input) const {
  int is_constant = 0;
  const Value* value = nullptr;
  check(kKernelInfoGetConstantInputTensor, info, input, &is_constant, &value);
  if (!is_constant || !value) {
    throw Failure(kInvalidArgument, "input " + std::to_string(input) + " is no constant initializer, as weights must be");
  }
  return tensor(value);
}

Tensor Api::input(KernelContext* context, size_t index) const {
  const Value* value = nullptr;
  check(kKernelContextGetInput, static_cast<const KernelContext*>(context), index, &value);
  if (!value) throw Failure(kInvalidArgument, "input " + std::to_string(index) + " is missing");
  return tensor(value);
}

float* Api::output(KernelContext* context, const std::vector<int64_t>& shape) const {
  Value* value = nullptr;
  void* data = nullptr;
  check(kKernelContextGetOutput, context, size_t{0}, shape.data(), shape.size(), &value);
  check(kGetTensorMutableData, value, &data);
  return static_cast<float*>(data);
}

Tensor Api::tensor(const Value* value) const {
  TypeAndShape* info = nullptr;
  check(kGetTensorTypeAndShape, value, &info);
  struct Release {
    const Api& api;
    TypeAndShape* info;
    ~Release() { api.call<void>(kReleaseTensorTypeAndShape, info); }
  } release{*this, info};
  const TypeAndShape* facts = info;
  int type = 0;
  size_t rank = 0;
  check(kGetTensorElementType, facts, &type);
  check(kGetDimensionsCount, facts, &rank);
  Tensor tensor{ElementType(type), std::vector<int64_t>(rank), nullptr};
  check(kGetDimensions, facts, tensor.shape.data(), rank);
  check(kGetTensorMutableData, const_cast<Value*>(value), &tensor.data);
  return tensor;
}

}  // namespace corral::ort
