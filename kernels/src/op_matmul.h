// TiledMatMul(x [..., inputs], codes [tiles, 2 bits inputs], scales [tiles, groups, 16], zero points? [tiles, groups, 8];
//             bits) -> y [..., 16 tiles]
#pragma once

#include "dispatch.h"
#include "multiply.h"
#include "operator.h"
#include "tokens.h"

namespace corral {

class TiledMatMul {
 public:
  static constexpr const char* kName = "TiledMatMul";
  static constexpr Port kInputs[] = {ort::kFloat, ort::kUint8, ort::kFloat16, {ort::kUint8, true}};
  static constexpr Port kOutputs[] = {ort::kFloat};

  TiledMatMul(const ort::Api& api, const ort::KernelInfo* info)
      : kernels_(*choose_instruction_set().kernels), weights_(read_weights(api, info, {1, 2, 3}, 2, "bits", "the matrix")) {}

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
