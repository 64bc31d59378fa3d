#include "weights.h"

namespace corral {

std::string shape_in_words(const std::vector<int64_t>& shape) {
  std::string words = "[";
  for (size_t i = 0; i < shape.size(); i++) words += (i ? ", " : "") + std::to_string(shape[i]);
  return words + "]";
}

Weights read_weights(const ort::Api& api, const ort::KernelInfo* info, size_t first, size_t rank, const char* bits_name,
                     const char* name) {
  const int64_t bits = api.attribute(info, bits_name), bytes_an_input = kTileOutputs * bits / 8;
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) {
    throw ort::Failure(ort::kInvalidArgument, std::string(bits_name) + " is " + std::to_string(bits) + ", expected 2, 3, 4 or 8");
  }
  const ort::Tensor codes = api.constant(info, first), scales = api.constant(info, first + 1);
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
  return {static_cast<const uint8_t*>(codes.data), static_cast<const uint16_t*>(scales.data),
          rank == 3 ? codes.shape[0] : 1, codes.shape[rank - 2], bits, inputs};
}

}  // namespace corral
