// One stored matrix, or one for each expert: codes uint8 [experts, tiles, 2 bits inputs], scales fp16 [experts, tiles,
// groups, 16], and where codes are asymmetric zero points uint8 [experts, tiles, groups, 8], in the layout of kernels.h. Read where ONNX Runtime holds them, mapped from the bundle's file: nothing is
// copied, and an expert that is never chosen is never touched.
#pragma once

#include <string>

#include "kernels.h"
#include "ort_api.h"

namespace corral {

struct Weights {
  const uint8_t* codes;
  const uint16_t* scales;
  const uint8_t* zeros;  // null: codes are symmetric
  int64_t experts, tiles, bits;
  Inputs inputs;

  int64_t outputs() const { return tiles * kTileOutputs; }

  Tile tile(int64_t expert, int64_t index) const {
    const int64_t i = expert * tiles + index, groups = i * (inputs.count / inputs.group);
    return {codes + i * inputs.count * kTileOutputs * bits / 8, scales + groups * kTileOutputs,
            zeros ? zeros + groups * kZeroBytes : nullptr};
  }
};

// Those that multiply with codes of so many bits.
inline const Products& products_of(const Kernels& kernels, int64_t bits) {
  return bits == 2 ? kernels.int2 : bits == 3 ? kernels.int3 : bits == 4 ? kernels.int4 : kernels.int8;
}

// Which inputs of an operator are a matrix.
struct WeightInputs {
  size_t codes, scales, zeros;  // the last is optional
};

// The attribute `bits` says what the codes have. Throws ort::Failure where types or shapes do not fit each other; `rank` is
// that of the codes: 2, or 3 with experts.
Weights read_weights(const ort::Api& api, const ort::KernelInfo* info, WeightInputs at, size_t rank, const char* bits,
                     const char* name);

std::string shape_in_words(const std::vector<int64_t>& shape);

}  // namespace corral
