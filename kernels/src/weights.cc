#include "weights.h"

namespace corral {

std::string shape_in_words(const std::vector<int64_t>& shape) {
  std::string words = "[";
  for (size_t i = 0; i < shape.size(); i++) words += (i ? ", " : "") + std::to_string(shape[i]);
  return words + "]";
}

Weights read_weights(const ort::Api& api, const ort::KernelInfo* info, WeightInputs at, size_t rank,
                     const char* bits_name, const char* name) {
  const int64_t bits = api.attribute(info, bits_name), bytes_an_input = kTileOutputs * bits / 8;
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) {
    throw ort::Failure(ort::kInvalidArgument, std::string(bits_name) + " is " + std::to_string(bits) + ", expected 2, 3, 4 or 8");
  }
  const ort::Tensor codes = api.constant(info, at.codes), scales = api.constant(info, at.scales);
  const auto refuse = [&](const char* expected) {
    throw ort::Failure(ort::kInvalidArgument, std::string(name) + ": codes " + shape_in_words(codes.shape) + ", scales " +
                                                  shape_in_words(scales.shape) + "; expected " + expected);
  };
  if (codes.type != ort::kUint8 || scales.type != ort::kFloat16) refuse("codes of type uint8 and scales of type float16");
  if (codes.shape.size() != rank || scales.shape.size() != rank + 1) {
    refuse(rank == 2 ? "codes [tiles, bytes] and scales [tiles, groups, 16]"
                     : "codes [experts, tiles, bytes] and scales [experts, tiles, groups, 16]");
  }
  for (size_t i = 0; i + 1 < rank; i++) {
    if (codes.shape[i] != scales.shape[i] || codes.shape[i] < 1) refuse("as many tiles (and experts) in both, at least one");
  }
  const int64_t bytes = codes.shape[rank - 1], groups = scales.shape[rank - 1];
  if (scales.shape[rank] != kTileOutputs || groups < 1 || bytes < 1 || bytes % (bytes_an_input * groups)) {
    refuse(("16 scales for each group of inputs, and " + std::to_string(bytes_an_input) + " bytes of codes for each input").c_str());
  }
  const Inputs inputs{bytes / bytes_an_input, bytes / bytes_an_input / groups};
  if (inputs.group != 32 && inputs.group != 64 && inputs.group != 128) refuse("32, 64 or 128 inputs in a group");
  if (!codes.data || !scales.data) refuse("data");
  const uint8_t* zeros = nullptr;
  if (api.has_input(info, at.zeros)) {
    const ort::Tensor given = api.constant(info, at.zeros);
    std::vector<int64_t> shape = scales.shape;
    shape.back() = kZeroBytes;
    if (given.type != ort::kUint8 || given.shape != shape || !given.data || bits > 4) {
      throw ort::Failure(ort::kInvalidArgument, std::string(name) + ": zero points " + shape_in_words(given.shape) +
                                                    " for codes of " + std::to_string(bits) + " bits; expected uint8 " +
                                                    shape_in_words(shape) + ", and codes of at most 4 bits");
    }
    zeros = static_cast<const uint8_t*>(given.data);
  }
  return {static_cast<const uint8_t*>(codes.data), static_cast<const uint16_t*>(scales.data), zeros,
          rank == 3 ? codes.shape[0] : 1, codes.shape[rank - 2], bits, inputs};
}

}  // namespace corral
