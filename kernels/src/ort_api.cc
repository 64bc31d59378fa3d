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

float Api::float_attribute(const KernelInfo* info, const char* name) const {
  float value = 0;
  check(kKernelInfoGetAttributeFloat, info, name, &value);
  return value;
}

bool Api::has_input(const KernelInfo* info, size_t index) const {
  size_t count = 0, name_bytes = 0;
  check(kKernelInfoGetInputCount, info, &count);
  if (index >= count) return false;
  check(kKernelInfoGetInputName, info, index, static_cast<char*>(nullptr), &name_bytes);
  return name_bytes > 1;  // one that is left out has an empty name, which ends like any other
}

bool Api::has_input(KernelContext* context, size_t index) const { return input_value(context, index) != nullptr; }

const Value* Api::input_value(KernelContext* context, size_t index) const {
  const Value* value = nullptr;
  check(kKernelContextGetInput, static_cast<const KernelContext*>(context), index, &value);
  return value;
}

Tensor Api::input(KernelContext* context, size_t index) const {
  const Value* value = input_value(context, index);
  if (!value) throw Failure(kInvalidArgument, "input " + std::to_string(index) + " is missing");
  return tensor(value);
}

void* Api::output_data(KernelContext* context, const std::vector<int64_t>& shape, size_t index) const {
  Value* value = nullptr;
  void* data = nullptr;
  check(kKernelContextGetOutput, context, index, shape.data(), shape.size(), &value);
  if (value) check(kGetTensorMutableData, value, &data);
  return data;
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
