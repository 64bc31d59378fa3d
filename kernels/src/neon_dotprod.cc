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
#include "tile_by_tile.h"

namespace corral {
namespace {

constexpr int kParts = 4;  // vectors of 4 outputs in a tile

using Bytes = uint8x16_t;

inline Bytes vector(const uint8_t* bytes) { return vld1q_u8(bytes); }
inline Bytes masked(Bytes bytes, int mask) { return vandq_u8(bytes, vdupq_n_u8(uint8_t(mask))); }
inline Bytes either(Bytes a, Bytes b) { return vorrq_u8(a, b); }
template <int Bits>
inline Bytes left(Bytes bytes) {
  if constexpr (Bits > 0) bytes = vshlq_n_u8(bytes, Bits);
  return bytes;
}
template <int Bits>
inline Bytes right(Bytes bytes) {
  if constexpr (Bits > 0) bytes = vshrq_n_u8(bytes, Bits);
  return bytes;
}

}  // namespace
}  // namespace corral

#include "codes.h"

namespace corral {
namespace {

// The dot product takes signed bytes. With the sign bit turned, codes of 8 bits are what they stand for; from others the zero
// point is still to be subtracted.
struct Int8 {
  static constexpr int32_t kBits = 8, kStep = 8;

  template <int Four>
  static inline Bytes load(const uint8_t* step) {
    return veorq_u8(vector(step + 64 * Four), vdupq_n_u8(128));
  }
};

template <class Codes>
constexpr int32_t kZero = Codes::kBits == 8 ? 0 : 1 << (Codes::kBits - 1);

// Four inputs of a row, as often as a vector holds them.
inline int8x16_t broadcast(const int8_t* codes) {
  int32_t word;
  std::memcpy(&word, codes, sizeof word);
  return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

// Adds the products of a step's fours from `Four` on.
template <class Codes, int Rows, int Four = 0>
inline void add_step(const uint8_t* step, const int8_t* x, int64_t rows, int32x4_t (&sum)[Rows][kParts]) {
  int8x16_t inputs[Rows];
  for (int i = 0; i < Rows; i++) inputs[i] = broadcast(x + 4 * (Four * rows + i));
  for (int part = 0; part < kParts; part++) {
    const int8x16_t w = vreinterpretq_s8_u8(Codes::template load<Four>(step + 16 * part));
    for (int i = 0; i < Rows; i++) sum[i][part] = vdotq_s32(sum[i][part], w, inputs[i]);
  }
  if constexpr (4 * (Four + 1) < Codes::kStep) add_step<Codes, Rows, Four + 1>(step, x, rows, sum);
}

// Less the zero points of a group and of 4 outputs.
inline int32x4_t minus_zeros(const Tile& tile, int64_t group, int part) {
  const uint8x8_t pairs = vld1_u8(tile.zeros + group * kZeroBytes);
  const uint16x8_t half = vmovl_u8(part < kParts / 2 ? vand_u8(pairs, vdup_n_u8(15)) : vshr_n_u8(pairs, 4));
  const uint16x4_t zeros = part % 2 ? vget_high_u16(half) : vget_low_u16(half);
  return vnegq_s32(vreinterpretq_s32_u32(vmovl_u16(zeros)));
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
      for (int32x4_t& s : sum[i]) s = vdupq_n_s32(-kZero<Codes> * panel.sums[at + i]);
    }
    if (tile.zeros) {
      for (int part = 0; part < kParts; part++) {
        const int32x4_t zeros = minus_zeros(tile, group, part);
        for (int i = 0; i < Rows; i++) sum[i][part] = vmulq_n_s32(zeros, panel.sums[at + i]);
      }
    }
    for (int64_t k = first; k < first + inputs.group; k += Codes::kStep) {
      add_step<Codes, Rows>(tile.codes + 2 * Codes::kBits * k, panel.codes + k * panel.rows + 4 * row, panel.rows, sum);
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

// --- attention ---

struct Lanes {
  float32x4_t v[4];
};

inline Lanes spread(float value) {
  const float32x4_t all = vdupq_n_f32(value);
  return {{all, all, all, all}};
}
inline Lanes zero() { return spread(0); }
inline Lanes load(const float* from) {
  return {{vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)}};
}
inline void store(float* into, Lanes lanes) {
  for (int i = 0; i < 4; i++) vst1q_f32(into + 4 * i, lanes.v[i]);
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  for (int i = 0; i < 4; i++) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
  return c;
}

constexpr int kSums = 4;  // that fit the registers beside what is read

inline void sums(const Lanes* lanes, float* into) {
  for (int i = 0; i < kSums; i++) {
    const float32x4_t(&v)[4] = lanes[i].v;
    const float32x4_t quarter = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
    const float32x2_t pair = vadd_f32(vget_low_f32(quarter), vget_high_f32(quarter));
    into[i] = vget_lane_f32(pair, 0) + vget_lane_f32(pair, 1);
  }
}

}  // namespace
}  // namespace corral

#include "kernel_table.h"

namespace corral {

extern const Kernels kNeonDotprod = kKernels;

}  // namespace corral
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
