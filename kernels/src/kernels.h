// What an instruction set must implement, and the two layouts its kernels read. Included by every kernel file, so it
// holds no inline function (see dispatch.h).
//
// Weights are stored in *tiles* of 16 outputs, the same for every instruction set. A tile is a row of vectors of 64 bytes,
// whose byte 4 r + c belongs to output r and to the c-th of each four inputs:
//   8 bits: a vector for four inputs, a byte is a code.
//   4 bits: a vector for twice four inputs, the first in the low half of a byte.
//   2 bits: a vector for four times four inputs, the first in the lowest bits.
//   3 bits: for each 32 inputs the two vectors of the codes' low 2 bits, then one of their high bits, the first lowest.
// Codes have the zero point 2^(bits - 1). A tile's scales are fp16 [inputs / group, 16].
//
// Activations are int8 in *panels* of up to 12 rows: codes [inputs / 4, rows, 4]; for each group of inputs the scale and
// the sum of the codes, [inputs / group, rows], because sum((w - zero) * x) = sum(w * x) - zero * sum(x).
#pragma once

#include <cstdint>

namespace corral {

constexpr int64_t kTileOutputs = 16;
constexpr int64_t kPanelRows = 12;
constexpr int64_t kLargestGroup = 128;
constexpr int64_t kBlock = 32;  // inputs: every group is some blocks

struct Tile {
  const uint8_t* codes;
  const uint16_t* scales;
};

struct Panel {
  int8_t* codes;
  float* scales;
  int32_t* sums;
  int64_t rows;
};

struct Inputs {
  int64_t count;  // a multiple of group
  int64_t group;  // 32, 64 or 128
};

// With tiles of so many bits. For each row of the panel, the 16 products with each tile; tile t's go to
// y[row * row_stride + 16 * t].
struct Products {
  void (*one_tile)(const Tile& tile, const Panel& panel, Inputs inputs, float* y, int64_t row_stride);
  void (*two_tiles)(const Tile& first, const Tile& second, const Panel& panel, Inputs inputs, float* y,
                    int64_t row_stride);
};

// Every instruction set gives the same bits: integers are summed exactly within a group, groups are added in order by
// fused multiply-add, and what is elementwise is written once (elementwise.h).
struct Kernels {
  // Quantizes one row into a panel, its values multiplied by `gain`. False where a value is not finite.
  bool (*quantize)(const float* x, float gain, Inputs inputs, const Panel& panel, int64_t row);
  Products int2, int3, int4, int8;
  // h[row * row_stride + i] = silu(gate) * up, of what two_tiles made of a gate tile and an up tile with stride 32.
  void (*swiglu)(const float* gate_up, int64_t rows, float* h, int64_t row_stride);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512Vnni;
#elif defined(__aarch64__)
extern const Kernels kNeonDotprod;
#endif

}  // namespace corral
