// Kernels for 64-bit ARM with int8 dot products (ARMv8.2 and later). Only called where dispatch.cc found these.
#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include <arm_neon.h>

#include "elementwise.h"
#include "kernels.h"

namespace corral {
namespace {

constexpr int kParts = 4;  // vectors of 4 outputs in a tile

// A tile's codes of 8 inputs, as signed numbers: of the first 4 and of the others.
struct Nibbles {
  static constexpr int64_t kBytesOf8 = 64;
  static constexpr int32_t kZero = 8;  // what is still to be subtracted

  static inline void load(const uint8_t* codes, int part, int8x16_t& low, int8x16_t& high) {
    const uint8x16_t w = vld1q_u8(codes + 16 * part);
    low = vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(15)));
    high = vreinterpretq_s8_u8(vshrq_n_u8(w, 4));
  }
};

struct Bytes {
  static constexpr int64_t kBytesOf8 = 128;
  static constexpr int32_t kZero = 0;  // with the sign bit turned, codes are what they stand for

  static inline void load(const uint8_t* codes, int part, int8x16_t& low, int8x16_t& high) {
    low = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(codes + 16 * part), vdupq_n_u8(128)));
    high = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(codes + 64 + 16 * part), vdupq_n_u8(128)));
  }
};

// Four inputs of a row, as often as a vector holds them.
inline int8x16_t broadcast(const int8_t* codes) {
  int32_t word;
  std::memcpy(&word, codes, sizeof word);
  return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

// `Rows` rows of the panel from `row` on.
template <class Codes, int Rows>
inline void multiply(const Tile& tile, const Panel& panel, int64_t row, Inputs inputs, float* y, int64_t row_stride) {
  float32x4_t total[Rows][kParts];
  for (auto& of_row : total) {
    for (float32x4_t& t : of_row) t = vdupq_n_f32(0);
  }
  for (int64_t group = 0; group < inputs.count / inputs.group; group++) {
    const int64_t first = group * inputs.group, at = group * panel.rows + row;
    int32x4_t sum[Rows][kParts];
    for (int i = 0; i < Rows; i++) {
      for (int32x4_t& s : sum[i]) s = vdupq_n_s32(-Codes::kZero * panel.sums[at + i]);
    }
    for (int64_t k = first; k < first + inputs.group; k += 8) {
      const int8_t *x_low = panel.codes + k * panel.rows + 4 * row, *x_high = x_low + 4 * panel.rows;
      int8x16_t low_of[Rows], high_of[Rows];
      for (int i = 0; i < Rows; i++) low_of[i] = broadcast(x_low + 4 * i), high_of[i] = broadcast(x_high + 4 * i);
      for (int part = 0; part < kParts; part++) {
        int8x16_t low, high;
        Codes::load(tile.codes + k / 8 * Codes::kBytesOf8, part, low, high);
        for (int i = 0; i < Rows; i++) {
          sum[i][part] = vdotq_s32(vdotq_s32(sum[i][part], low, low_of[i]), high, high_of[i]);
        }
      }
    }
    for (int part = 0; part < kParts; part++) {
      const uint16_t* scales = tile.scales + group * kTileOutputs + 4 * part;
      const float32x4_t weight_scale = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(scales)));
      for (int i = 0; i < Rows; i++) {
        const float32x4_t scale = vmulq_n_f32(weight_scale, panel.scales[at + i]);
        total[i][part] = vfmaq_f32(total[i][part], vcvtq_f32_s32(sum[i][part]), scale);
      }
    }
  }
  for (int i = 0; i < Rows; i++) {
    for (int part = 0; part < kParts; part++) vst1q_f32(y + i * row_stride + 4 * part, total[i][part]);
  }
}

template <class Codes>
void one_tile(const Tile& tile, const Panel& panel, Inputs inputs, float* y, int64_t row_stride) {
  int64_t row = 0;
  for (; row + 3 <= panel.rows; row += 3) multiply<Codes, 3>(tile, panel, row, inputs, y + row * row_stride, row_stride);
  for (; row + 2 <= panel.rows; row += 2) multiply<Codes, 2>(tile, panel, row, inputs, y + row * row_stride, row_stride);
  if (row < panel.rows) multiply<Codes, 1>(tile, panel, row, inputs, y + row * row_stride, row_stride);
}

template <class Codes>
void two_tiles(const Tile& first, const Tile& second, const Panel& panel, Inputs inputs, float* y, int64_t row_stride) {
  one_tile<Codes>(first, panel, inputs, y, row_stride);
  one_tile<Codes>(second, panel, inputs, y + kTileOutputs, row_stride);
}

}  // namespace

extern const Kernels kNeonDotprod{
    quantize_row, {one_tile<Nibbles>, two_tiles<Nibbles>}, {one_tile<Bytes>, two_tiles<Bytes>}, swiglu_rows};

}  // namespace corral
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
