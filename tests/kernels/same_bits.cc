// Every instruction set of this processor against the portable kernels, bit by bit. Prints each one's name and "equal", or
// the first call that differs, and then fails. Needs no ONNX Runtime, so that it also runs in an emulator.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "dispatch.h"
#include "weights.h"

using namespace corral;

namespace {

std::mt19937 generator(1);

float normal() { return std::normal_distribution<float>()(generator); }

struct Matrix {
  std::vector<uint8_t> codes;
  std::vector<uint16_t> scales;
  std::vector<uint8_t> zeros;  // none where codes are symmetric
  Tile tile(int64_t index, Inputs inputs, int64_t bits) const {
    const int64_t groups = index * (inputs.count / inputs.group);
    return {codes.data() + index * inputs.count * 2 * bits, scales.data() + groups * kTileOutputs,
            zeros.empty() ? nullptr : zeros.data() + groups * kZeroBytes};
  }
};

// Two tiles; with `extreme`, the codes and zero points at both ends only.
Matrix matrix(Inputs inputs, int64_t bits, bool extreme, bool asymmetric) {
  const int64_t groups = 2 * (inputs.count / inputs.group);
  Matrix made{std::vector<uint8_t>(2 * inputs.count * 2 * bits), std::vector<uint16_t>(groups * kTileOutputs),
              std::vector<uint8_t>(asymmetric ? groups * kZeroBytes : 0)};
  for (uint8_t& code : made.codes) code = extreme ? uint8_t(generator() % 2 ? 255 : 0) : uint8_t(generator());
  for (uint8_t& zero : made.zeros) zero = extreme ? uint8_t(generator() % 2 ? 255 : 0) : uint8_t(generator());
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

template <class T>
bool equal(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

const char* first_difference(const Kernels& kernels, int64_t rows, Inputs inputs, int64_t bits, bool extreme,
                             bool asymmetric) {
  std::vector<float> x(rows * inputs.count);
  for (float& value : x) value = extreme ? (generator() % 2 ? 127.0f : -127.0f) : normal();
  Rows here = quantized(kernels, x, rows, inputs), there = quantized(kPortable, x, rows, inputs);
  if (!equal(here.codes, there.codes) || !equal(here.scales, there.scales) || !equal(here.sums, there.sums)) return "quantize";
  const Matrix weights = matrix(inputs, bits, extreme, asymmetric);
  const Tile first = weights.tile(0, inputs, bits), second = weights.tile(1, inputs, bits);
  const Products &mine = products_of(kernels, bits), &theirs = products_of(kPortable, bits);
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

std::vector<float> normals(int64_t count) {
  std::vector<float> made(count);
  for (float& value : made) value = normal();
  return made;
}

// Queries that see from no row to all rows of a block, and a second block behind it.
const char* attention_difference(const AttentionKernels& mine, const AttentionKernels& theirs, int64_t dim, int64_t rows) {
  const int64_t count = 7, stride = count * (dim + kPartialExtra);
  const std::vector<float> raw = normals(dim), cos = normals(dim / 2), sin = normals(dim / 2);
  std::vector<float> placed(dim), placed_want(dim);
  for (const Rotation& rotation : {Rotation{cos.data(), sin.data(), 1e-5f}, Rotation{nullptr, nullptr, 0.0f}}) {
    mine.place(raw.data(), rotation, dim, 0.7f, placed.data());
    theirs.place(raw.data(), rotation, dim, 0.7f, placed_want.data());
    if (!equal(placed, placed_want)) return "place";
  }
  const std::vector<float> queries = normals(count * dim), keys = normals(rows * dim), values = normals(rows * dim);
  std::vector<int64_t> visible(count);
  for (int64_t i = 0; i < count; i++) visible[i] = rows * i / (count - 1);
  const AttentionBlock block{queries.data(), visible.data(), count, keys.data(), values.data(), rows, dim};
  std::vector<float> got(2 * stride), want(2 * stride);
  for (int64_t i = 0; i < 2; i++) {
    mine.attend(block, got.data() + i * stride);
    theirs.attend(block, want.data() + i * stride);
  }
  if (!equal(got, want)) return "attend";
  std::vector<float> y(dim), y_want(dim);
  const int64_t last = (count - 1) * (dim + kPartialExtra);
  mine.merge(got.data() + last, 2, stride, dim, y.data());
  theirs.merge(want.data() + last, 2, stride, dim, y_want.data());
  return equal(y, y_want) ? nullptr : "merge";
}

const char* norm_difference(const Kernels& kernels, int64_t count) {
  const std::vector<float> x = normals(count), other = normals(count);
  std::vector<float> got(count), want(count);
  kernels.norm(x.data(), other.data(), count, 1e-5f, got.data());
  kPortable.norm(x.data(), other.data(), count, 1e-5f, want.data());
  if (!equal(got, want)) return "norm";
  kernels.add(x.data(), other.data(), count, got.data());
  kPortable.add(x.data(), other.data(), count, want.data());
  return equal(got, want) ? nullptr : "add";
}

}  // namespace

int main() {
  const InstructionSet& best = choose_instruction_set();
  for (int64_t dim : {16, 48, 128, 256}) {
    for (int64_t rows : {1, 2, 31, 128}) {
      const char* what = attention_difference(best.kernels->attention, kPortable.attention, dim, rows);
      if (!what) what = norm_difference(*best.kernels, dim + rows);
      if (what) {
        std::printf("%s: %s differs with heads of %d, %d rows\n", best.name, what, int(dim), int(rows));
        return 1;
      }
    }
  }
  for (int64_t bits : {2, 3, 4, 8}) {
    for (int64_t group : {32, 64, 128}) {
      for (int64_t rows = 1; rows <= kPanelRows; rows++) {
        for (int kind = 0; kind < (bits == 8 ? 2 : 4); kind++) {
          const bool extreme = kind % 2, asymmetric = kind / 2;
          if (const char* what = first_difference(*best.kernels, rows, {3 * group, group}, bits, extreme, asymmetric)) {
            std::printf("%s: %s differs with %d bits, groups of %d, %d rows%s%s\n", best.name, what, int(bits), int(group),
                        int(rows), extreme ? ", extreme values" : "", asymmetric ? ", zero points" : "");
            return 1;
          }
        }
      }
    }
  }
  std::printf("%s equal\n", best.name);
  return 0;
}
