// AddRmsNorm(x [..., H], weight [H], residual? [..., H]; epsilon) -> normed, sum? [..., H]
//
// sum = x + residual, or x; normed = sum / sqrt(mean of its squares + epsilon) * weight.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "operator.h"
#include "tokens.h"

namespace corral {

class AddRmsNorm {
 public:
  static constexpr const char* kName = "AddRmsNorm";
  static constexpr Port kInputs[] = {ort::kFloat, ort::kFloat, {ort::kFloat, true}};
  static constexpr Port kOutputs[] = {ort::kFloat, {ort::kFloat, true}};

  AddRmsNorm(const ort::Api& api, const ort::KernelInfo* info)
      : kernels_(*choose_instruction_set().kernels), epsilon_(api.float_attribute(info, "epsilon")) {
    if (!(epsilon_ >= 0)) throw ort::Failure(ort::kInvalidArgument, "epsilon is below zero");
  }

  void compute(const ort::Api& api, ort::KernelContext* context) const {
    const ort::Tensor weight = api.input(context, 1);
    if (weight.shape.size() != 1) {
      throw ort::Failure(ort::kInvalidArgument, "weight has shape " + shape_in_words(weight.shape) + ", expected [H]");
    }
    const int64_t hidden = weight.shape[0];
    const Tokens x = read_tokens(api, context, 0, hidden, "x");
    const float* residual = nullptr;
    if (api.has_input(context, 2)) {
      const Tokens other = read_tokens(api, context, 2, hidden, "residual");
      if (other.shape != x.shape) {
        throw ort::Failure(ort::kInvalidArgument, "residual has shape " + shape_in_words(other.shape) +
                                                      ", expected that of x, " + shape_in_words(x.shape));
      }
      residual = other.values;
    }
    float *normed = api.output(context, x.shape), *sum = api.output(context, x.shape, 1);
    const float* weights = static_cast<const float*>(weight.data);
    const int64_t tasks = (x.count + kTaskRows - 1) / kTaskRows;
    ort::Workers(api, context).each_worth(tasks, 4 * x.count * hidden, [&](size_t task) {
      const int64_t begin = int64_t(task) * kTaskRows, end = std::min(begin + kTaskRows, x.count);
      for (int64_t at = begin * hidden; at < end * hidden; at += hidden) {
        const float* values = x.values + at;
        if (residual) {
          float* into = (sum ? sum : normed) + at;  // where nobody wants the sum, it lies where the norm will
          kernels_.add(values, residual + at, hidden, into);
          values = into;
        } else if (sum) {
          std::copy_n(values, hidden, sum + at);
        }
        kernels_.norm(values, weights, hidden, epsilon_, normed + at);
      }
    });
  }

 private:
  static constexpr int64_t kTaskRows = 16;

  const Kernels& kernels_;
  float epsilon_;
};

}  // namespace corral
