// What an instruction set must implement, and the layouts its kernels read. Included by every kernel file, so it
// holds no inline function (see dispatch.h).
//
// Weights are stored in *tiles* of 16 outputs, the same for every instruction set. A tile is a row of vectors of 64 bytes,
// whose byte 4 r + c belongs to output r and to the c-th of each four inputs:
//   8 bits: a vector for four inputs, a byte is a code.
//   4 bits: a vector for twice four inputs, the first in the low half of a byte.
//   2 bits: a vector for four times four inputs, the first in the lowest bits.
//   3 bits: for each 32 inputs the two vectors of the codes' low 2 bits, then one of their high bits, the first lowest.
// A tile's scales are fp16 [inputs / group, 16]. Codes have the zero point 2^(bits - 1), or of up to 4 bits one for each
// output and group: bytes [inputs / group, 8], output r's in the low half of byte r, output r + 8's in the high half.
//
// Activations are int8 in *panels* of up to 12 rows: codes [inputs / 4, rows, 4]; for each group of inputs the scale and
// the sum of the codes, [inputs / group, rows], because sum((w - zero) * x) = sum(w * x) - zero * sum(x).
#pragma once

#include <cstdint>

namespace corral {

constexpr int64_t kTileOutputs = 16;
constexpr int64_t kPanelRows = 12;
constexpr int64_t kLargestGroup = 128;
constexpr int64_t kLanes = 16;  // in which sums of floats are added up
constexpr int64_t kZeroBytes = kTileOutputs / 2;  // of a tile's zero points for one group
constexpr int64_t kBlock = 32;  // inputs: every group is some blocks

struct Tile {
  const uint8_t* codes;
  const uint16_t* scales;
  const uint8_t* zeros;  // null: all 2^(bits - 1)
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

// One query or key of a head: how it is turned, normed and scaled.
struct Rotation {
  const float *cos, *sin;  // [dim / 2] of interleaved pairs; null: not turned
  float epsilon;           // of the norm without weights that follows; 0: none
};

constexpr int64_t kBlockRows = 128;   // cache rows that are attended to at once
constexpr int64_t kBlockQueries = 64;
constexpr int64_t kLargestHead = 256;
constexpr int64_t kPartialExtra = kLanes;  // floats beside the dim weighed values of a partial

// Some queries of one head, already scaled, on a block of its cache. dim is a multiple of 16, at most kLargestHead.
struct AttentionBlock {
  const float* queries;    // [count, dim], count at most kBlockQueries
  const int64_t* visible;  // of the block's rows, how many each query sees
  int64_t count;
  const float *keys, *values;  // [rows, dim]
  int64_t rows, dim;
};

// How a row of `dim` values is stored in a cache, and read again as floats (cache_rows.h).
struct RowCodec {
  int64_t group;  // values that share a scale, or all of a row that has fewer
  int64_t (*bytes)(int64_t dim);
  void (*store)(const float* values, int64_t dim, uint8_t* row);
  void (*load)(const uint8_t* rows, int64_t count, int64_t dim, float* values);
};

// Written once (attention_kernels.h) over sixteen lanes, for each instruction set the same bits.
struct AttentionKernels {
  void (*place)(const float* x, const Rotation& rotation, int64_t dim, float gain, float* y);
  // For each query partials [dim + kPartialExtra]: the values weighed by e^(score - largest), the sum of the weights, the
  // largest score.
  void (*attend)(const AttentionBlock& block, float* partials);
  // One query's partials of consecutive blocks, `stride` floats apart -> y [dim].
  void (*merge)(const float* partials, int64_t blocks, int64_t stride, int64_t dim, float* y);
  RowCodec int8_rows, int4_rows;
};

// Every instruction set gives the same bits: integers are summed exactly within a group, groups are added in order by
// fused multiply-add, and what is elementwise is written once (elementwise.h).
struct Kernels {
  // Quantizes one row into a panel, its values multiplied by `gain`. False where a value is not finite.
  bool (*quantize)(const float* x, float gain, Inputs inputs, const Panel& panel, int64_t row);
  Products int2, int3, int4, int8;
  // h[row * row_stride + i] = silu(gate) * up, of what two_tiles made of a gate tile and an up tile with stride 32.
  void (*swiglu)(const float* gate_up, int64_t rows, float* h, int64_t row_stride);
  // y = x / sqrt(mean of its squares + epsilon) * weight, [count] each.
  void (*norm)(const float* x, const float* weight, int64_t count, float epsilon, float* y);
  void (*add)(const float* a, const float* b, int64_t count, float* y);
  AttentionKernels attention;
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512Vnni;
#elif defined(__aarch64__)
extern const Kernels kNeonDotprod;
#endif

}  // namespace corral
