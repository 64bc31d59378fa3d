// Int4MatMul(x [..., inputs], codes [tiles, 8 inputs], scales [tiles, groups, 16]) -> y [..., 16 tiles]
#pragma once

#include "dispatch.h"
#include "multiply.h"
#include "operator.h"
#include "tokens.h"

namespace corral {

class Int4MatMul {
 public:
  static constexpr const char* kName = "Int4MatMul";
  static constexpr Port kInputs[] = {ort::kFloat, ort::kUint8, ort::kFloat16};
  static constexpr Port kOutputs[] = {ort::kFloat};

  Int4MatMul(const ort::Api& api, const ort::KernelInfo* info)
      : kernels_(*choose_instruction_set().kernels), weights_(read_weights(api, info, 1, 2, "the matrix")) {}

  void compute(const ort::Api& api, ort::KernelContext* context) const {
    const Tokens x = read_tokens(api, context, 0, weights_.inputs.count, "x");
    float* y = api.output(context, x.shape_with_last(weights_.outputs()));
    if (x.count) multiply(kernels_, ort::Workers(api, context), weights_, x.values, x.count, y);
  }

 private:
  const Kernels& kernels_;
  Weights weights_;
};

}  // namespace corral
