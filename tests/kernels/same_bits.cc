// Every instruction set of this processor against the portable kernels, bit by bit. Prints each one's name and "equal", or
// the first call that differs, and then fails. Needs no ONNX Runtime, so that it also runs in an emulator.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "dispatch.h"

using namespace corral;

namespace {

std::mt19937 generator(1);

float normal() { return std::normal_distribution<float>()(generator); }

struct Matrix {
  std::vector<uint8_t> codes;
  std::vector<uint16_t> scales;
  Tile tile(int64_t index, Inputs inputs, int64_t bits) const {
    return {codes.data() + index * inputs.count * 2 * bits, scales.data() + index * (inputs.count / inputs.group) * kTileOutputs};
  }
};

// Two tiles; with `extreme`, the codes at both ends only.
Matrix matrix(Inputs inputs, int64_t bits, bool extreme) {
  Matrix made{std::vector<uint8_t>(2 * inputs.count * 2 * bits),
              std::vector<uint16_t>(2 * (inputs.count / inputs.group) * kTileOutputs)};
  for (uint8_t& code : made.codes) code = extreme ? uint8_t(generator() % 2 ? 255 : 0) : uint8_t(generator());
  for (uint16_t& scale : made.scales) scale = uint16_t(generator() % 0x5000);  // zero, subnormal, up to 32
  return made;
}

struct Rows {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  Panel panel(int64_t rows) { return {codes.data(), scales.data(), sums.data(), rows}; }
};

Rows quantized(const Kernels& kernels, const std::vector<float>& x, int64_t rows, Inputs inputs) {
  const int64_t groups = rows * inputs.count / inputs.group;
  Rows made{std::vector<int8_t>(rows * inputs.count), std::vector<float>(groups), std::vector<int32_t>(groups)};
  for (int64_t row = 0; row < rows; row++) {
    if (!kernels.quantize(x.data() + row * inputs.count, 0.7f, inputs, made.panel(rows), row)) std::printf("not finite\n");
  }
  return made;
}

const Products& products(const Kernels& kernels, int64_t bits) {
  return bits == 2 ? kernels.int2 : bits == 3 ? kernels.int3 : bits == 4 ? kernels.int4 : kernels.int8;
}

template <class T>
bool equal(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

const char* first_difference(const Kernels& kernels, int64_t rows, Inputs inputs, int64_t bits, bool extreme) {
  std::vector<float> x(rows * inputs.count);
  for (float& value : x) value = extreme ? (generator() % 2 ? 127.0f : -127.0f) : normal();
  Rows here = quantized(kernels, x, rows, inputs), there = quantized(kPortable, x, rows, inputs);
  if (!equal(here.codes, there.codes) || !equal(here.scales, there.scales) || !equal(here.sums, there.sums)) return "quantize";
  const Matrix weights = matrix(inputs, bits, extreme);
  const Tile first = weights.tile(0, inputs, bits), second = weights.tile(1, inputs, bits);
  const Products &mine = products(kernels, bits), &theirs = products(kPortable, bits);
  const int64_t stride = 2 * kTileOutputs;
  std::vector<float> got(rows * stride), want(rows * stride);
  mine.one_tile(first, here.panel(rows), inputs, got.data(), stride);
  theirs.one_tile(first, there.panel(rows), inputs, want.data(), stride);
  if (!equal(got, want)) return "one_tile";
  mine.two_tiles(first, second, here.panel(rows), inputs, got.data(), stride);
  theirs.two_tiles(first, second, there.panel(rows), inputs, want.data(), stride);
  if (!equal(got, want)) return "two_tiles";
  std::vector<float> h(rows * kTileOutputs), h_want(rows * kTileOutputs);
  for (float& value : got) value = 40 * normal();
  kernels.swiglu(got.data(), rows, h.data(), kTileOutputs);
  kPortable.swiglu(got.data(), rows, h_want.data(), kTileOutputs);
  return equal(h, h_want) ? nullptr : "swiglu";
}

}  // namespace

int main() {
  const InstructionSet& best = choose_instruction_set();
  for (int64_t bits : {2, 3, 4, 8}) {
    for (int64_t group : {32, 64, 128}) {
      for (int64_t rows = 1; rows <= kPanelRows; rows++) {
        for (bool extreme : {false, true}) {
          if (const char* what = first_difference(*best.kernels, rows, {3 * group, group}, bits, extreme)) {
            std::printf("%s: %s differs with %d bits, groups of %d, %d rows%s\n", best.name, what, int(bits), int(group),
                        int(rows), extreme ? ", extreme values" : "");
            return 1;
          }
        }
      }
    }
  }
  std::printf("%s equal\n", best.name);
  return 0;
}
