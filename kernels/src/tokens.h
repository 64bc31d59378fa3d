// The activations an operator is given: a float tensor whose last axis is one token's values.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ort_api.h"
#include "weights.h"

namespace corral {

struct Tokens {
  std::vector<int64_t> shape;  // as given
  int64_t count;
  const float* values;

  std::vector<int64_t> shape_with_last(int64_t last) const {
    std::vector<int64_t> changed = shape;
    changed.back() = last;
    return changed;
  }
};

// Throws ort::Failure unless input `index` is float [..., last].
inline Tokens read_tokens(const ort::Api& api, ort::KernelContext* context, size_t index, int64_t last, const char* name) {
  const ort::Tensor tensor = api.input(context, index);
  if (tensor.type != ort::kFloat || tensor.shape.empty() || tensor.shape.back() != last) {
    throw ort::Failure(ort::kInvalidArgument, std::string(name) + " has shape " + shape_in_words(tensor.shape) +
                                                  ", expected float values [..., " + std::to_string(last) + "]");
  }
  int64_t count = 1;
  for (size_t i = 0; i + 1 < tensor.shape.size(); i++) count *= tensor.shape[i];
  return {tensor.shape, count, static_cast<const float*>(tensor.data)};
}

}  // namespace corral
