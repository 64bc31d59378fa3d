// Kernels in plain C++: what every other instruction set must equal bit by bit.
#include "elementwise.h"
#include "kernels.h"
#include "tile_by_tile.h"

namespace corral {
namespace {

// The code of one output and of input k of a block, where a vector is shared by whole fours.
template <int bits>
struct Packed {
  static constexpr int32_t kBits = bits;
  static int32_t code(const uint8_t* block, int64_t output, int64_t k) {
    constexpr int64_t shared = 8 / bits;
    return block[64 * (k / 4 / shared) + 4 * output + k % 4] >> (bits * (k / 4 % shared)) & ((1 << bits) - 1);
  }
};

using Int2 = Packed<2>;
using Int4 = Packed<4>;
using Int8 = Packed<8>;

struct Int3 {
  static constexpr int32_t kBits = 3;
  static int32_t code(const uint8_t* block, int64_t output, int64_t k) {
    return Int2::code(block, output, k) | (block[128 + 4 * output + k % 4] >> (k / 4) & 1) << 2;
  }
};

int32_t zero_point(const Tile& tile, int64_t group, int64_t output, int32_t bits) {
  if (!tile.zeros) return 1 << (bits - 1);
  return tile.zeros[group * kZeroBytes + output % kZeroBytes] >> (4 * (output / kZeroBytes)) & 15;
}

template <class Codes>
void one_tile(const Tile& tile, const Panel& panel, Inputs inputs, float* y, int64_t row_stride) {
  for (int64_t row = 0; row < panel.rows; row++) {
    float total[kTileOutputs] = {};
    for (int64_t group = 0; group < inputs.count / inputs.group; group++) {
      int32_t sum[kTileOutputs];
      for (int64_t r = 0; r < kTileOutputs; r++) {
        sum[r] = -zero_point(tile, group, r, Codes::kBits) * panel.sums[group * panel.rows + row];
      }
      for (int64_t first = group * inputs.group; first < (group + 1) * inputs.group; first += kBlock) {
        const uint8_t* block = tile.codes + 2 * Codes::kBits * first;
        for (int64_t k = 0; k < kBlock; k++) {
          const int32_t x = panel.codes[((first + k) / 4 * panel.rows + row) * 4 + k % 4];
          for (int64_t r = 0; r < kTileOutputs; r++) sum[r] += Codes::code(block, r, k) * x;
        }
      }
      const float scale = panel.scales[group * panel.rows + row];
      for (int64_t r = 0; r < kTileOutputs; r++) {
        const float weight_scale = float_of_half(tile.scales[group * kTileOutputs + r]);
        total[r] = __builtin_fmaf(float(sum[r]), weight_scale * scale, total[r]);
      }
    }
    std::memcpy(y + row * row_stride, total, sizeof total);
  }
}

// --- attention ---

struct Lanes {
  float v[kLanes];
};

inline Lanes zero() { return {}; }
inline Lanes spread(float value) {
  Lanes lanes;
  for (float& v : lanes.v) v = value;
  return lanes;
}
inline Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(lanes.v, from, sizeof lanes.v);
  return lanes;
}
inline void store(float* into, Lanes lanes) { std::memcpy(into, lanes.v, sizeof lanes.v); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  for (int64_t i = 0; i < kLanes; i++) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
}

constexpr int kSums = 4;

// Lane i and lane i + 8, then i + 4, i + 2, i + 1: the order that others find cheap.
inline void sums(const Lanes* lanes, float* into) {
  for (int s = 0; s < kSums; s++) {
    Lanes left = lanes[s];
    for (int64_t half = kLanes / 2; half >= 1; half /= 2) {
      for (int64_t i = 0; i < half; i++) left.v[i] += left.v[i + half];
    }
    into[s] = left.v[0];
  }
}

}  // namespace
}  // namespace corral

#include "kernel_table.h"

namespace corral {

extern const Kernels kPortable = kKernels;

}  // namespace corral
