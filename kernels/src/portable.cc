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

// The product of the codes of one output by 8 inputs and a row's; `low` are the first 4 of the row's, `high` the others.
struct Nibbles {
  static constexpr int64_t kBytesOf8 = 64;
  static constexpr int32_t kZero = 8;

  static int32_t product(const uint8_t* w, int64_t output, const int8_t* low, const int8_t* high) {
    int32_t sum = 0;
    for (int64_t c = 0; c < 4; c++) sum += (w[4 * output + c] & 15) * low[c] + (w[4 * output + c] >> 4) * high[c];
    return sum;
  }
};

struct Bytes {
  static constexpr int64_t kBytesOf8 = 128;
  static constexpr int32_t kZero = 128;

  static int32_t product(const uint8_t* w, int64_t output, const int8_t* low, const int8_t* high) {
    int32_t sum = 0;
    for (int64_t c = 0; c < 4; c++) sum += w[4 * output + c] * low[c] + w[64 + 4 * output + c] * high[c];
    return sum;
  }
};

template <class Codes>
void one_tile(const Tile& tile, const Panel& panel, Inputs inputs, float* y, int64_t row_stride) {
  for (int64_t row = 0; row < panel.rows; row++) {
    float total[kTileOutputs] = {};
    for (int64_t group = 0; group < inputs.count / inputs.group; group++) {
      int32_t sum[kTileOutputs];
      for (int32_t& s : sum) s = -Codes::kZero * panel.sums[group * panel.rows + row];
      for (int64_t k = group * inputs.group; k < (group + 1) * inputs.group; k += 8) {
        const uint8_t* w = tile.codes + k / 8 * Codes::kBytesOf8;
        const int8_t *low = panel.codes + k * panel.rows + 4 * row, *high = low + 4 * panel.rows;
        for (int64_t r = 0; r < kTileOutputs; r++) sum[r] += Codes::product(w, r, low, high);
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

}  // namespace

extern const Kernels kPortable{
    quantize_row, {one_tile<Nibbles>, two_tiles<Nibbles>}, {one_tile<Bytes>, two_tiles<Bytes>}, swiglu_rows};

}  // namespace corral
