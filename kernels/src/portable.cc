// Kernels in plain C++: what every other instruction set must equal bit by bit.
#include "elementwise.h"
#include "kernels.h"

namespace corral {
namespace {

float float_of_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, mantissa = half & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = float(mantissa) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 31) return float_of(sign | kInfinityBits | mantissa << 13);
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

// The code of one output and of input k of a block.
struct Int8 {
  static constexpr int32_t kBits = 8;
  static int32_t code(const uint8_t* block, int64_t output, int64_t k) { return block[64 * (k / 4) + 4 * output + k % 4]; }
};

struct Int4 {
  static constexpr int32_t kBits = 4;
  static int32_t code(const uint8_t* block, int64_t output, int64_t k) {
    return block[64 * (k / 8) + 4 * output + k % 4] >> (4 * (k / 4 % 2)) & 15;
  }
};

struct Int2 {
  static constexpr int32_t kBits = 2;
  static int32_t code(const uint8_t* block, int64_t output, int64_t k) {
    return block[64 * (k / 16) + 4 * output + k % 4] >> (2 * (k / 4 % 4)) & 3;
  }
};

struct Int3 {
  static constexpr int32_t kBits = 3;
  static int32_t code(const uint8_t* block, int64_t output, int64_t k) {
    return Int2::code(block, output, k) | (block[128 + 4 * output + k % 4] >> (k / 4) & 1) << 2;
  }
};

template <class Codes>
void one_tile(const Tile& tile, const Panel& panel, Inputs inputs, float* y, int64_t row_stride) {
  for (int64_t row = 0; row < panel.rows; row++) {
    float total[kTileOutputs] = {};
    for (int64_t group = 0; group < inputs.count / inputs.group; group++) {
      int32_t sum[kTileOutputs];
      for (int32_t& s : sum) s = -(1 << (Codes::kBits - 1)) * panel.sums[group * panel.rows + row];
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

template <class Codes>
void two_tiles(const Tile& first, const Tile& second, const Panel& panel, Inputs inputs, float* y, int64_t row_stride) {
  one_tile<Codes>(first, panel, inputs, y, row_stride);
  one_tile<Codes>(second, panel, inputs, y + kTileOutputs, row_stride);
}

template <class Codes>
constexpr Products kProducts{one_tile<Codes>, two_tiles<Codes>};

}  // namespace

extern const Kernels kPortable{quantize_row,    kProducts<Int2>, kProducts<Int3>,
                          kProducts<Int4>, kProducts<Int8>, swiglu_rows};

}  // namespace corral
