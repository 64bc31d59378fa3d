// The elementwise half of the kernels in plain C++, for the compiler to vectorize for each instruction set. In an unnamed
// namespace: the linker must not take one file's version for another's.
//
// No expression here may be contracted or reordered (-ffp-contract=off), or the instruction sets would differ in bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace corral {
namespace {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// 1.5 * 2^23: adding it rounds a float of magnitude below 2^22 to the nearest integer, ties to even, in its low bits.
constexpr float kRound = 12582912.0f;
constexpr uint32_t kRoundBits = 0x4b400000u;
constexpr uint32_t kInfinityBits = 0x7f800000u;
inline float float_of_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, mantissa = half & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = float(mantissa) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 31) return float_of(sign | kInfinityBits | mantissa << 13);
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

// To the nearest, ties to even.
inline uint16_t half_of(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  if (magnitude > kInfinityBits) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more
  if (magnitude < 0x38800000u) {                        // below 2^-14: adding 0.5 rounds to multiples of 2^-24
    return sign | uint16_t(bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u);
  }
  return sign | uint16_t((magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13);
}

// A group whose largest magnitude is below this counts as zeros; 127 / it would be near the largest float.
constexpr float kNothing = 1e-36f;

inline bool quantize_row(const float* x, float gain, Inputs inputs, const Panel& panel, int64_t row) {
  for (int64_t group = 0; group < inputs.count / inputs.group; group++, x += inputs.group) {
    int32_t largest_bits = 0;  // magnitudes compare like their bits, and NaN is above infinity
    for (int64_t k = 0; k < inputs.group; k++) {
      const int32_t magnitude = int32_t(bits_of(x[k]) & 0x7fffffffu);
      largest_bits = largest_bits > magnitude ? largest_bits : magnitude;
    }
    if (uint32_t(largest_bits) >= kInfinityBits) return false;
    const float largest = float_of(uint32_t(largest_bits));
    const float per_code = largest < kNothing ? 0.0f : 127.0f / largest;
    int8_t codes[kLargestGroup];
    int32_t sum = 0;
    for (int64_t k = 0; k < inputs.group; k++) {
      const int32_t code = int32_t(bits_of(x[k] * per_code + kRound) - kRoundBits);
      sum += code;
      codes[k] = int8_t(code);
    }
    int8_t* out = panel.codes + (group * inputs.group * panel.rows + 4 * row);
    for (int64_t k = 0; k < inputs.group; k += 4) std::memcpy(out + k * panel.rows, codes + k, 4);
    panel.scales[group * panel.rows + row] = largest < kNothing ? 0.0f : largest / 127.0f * gain;
    panel.sums[group * panel.rows + row] = sum;
  }
  return true;
}

// e^x within 2 units in the last place: x = n ln 2 + r, a polynomial of degree 6 for e^r, n into the exponent.
inline float exp_of(float x) {
  x = x < 88.0f ? x : 88.0f;
  x = x > -87.0f ? x : -87.0f;
  const float rounded = x * 1.44269504f + kRound;
  const float n = rounded - kRound;
  float r = __builtin_fmaf(n, -0.693359375f, x);
  r = __builtin_fmaf(n, 2.12194440e-4f, r);
  float p = 1.0f / 720;
  p = __builtin_fmaf(p, r, 1.0f / 120);
  p = __builtin_fmaf(p, r, 1.0f / 24);
  p = __builtin_fmaf(p, r, 1.0f / 6);
  p = __builtin_fmaf(p, r, 0.5f);
  p = __builtin_fmaf(p, r, 1.0f);
  p = __builtin_fmaf(p, r, 1.0f);
  return p * float_of((bits_of(rounded) - kRoundBits + 127u) << 23);
}

// Added up in sixteen lanes, and those by halves. square: of the values' squares.
template <bool square>
inline float sum_of(const float* values, int64_t count) {
  float lane[kLanes] = {};
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t j = 0; j < kLanes; j++) lane[j] += square ? values[i + j] * values[i + j] : values[i + j];
  }
  for (int64_t i = whole; i < count; i++) lane[i - whole] += square ? values[i] * values[i] : values[i];
  for (int64_t half = kLanes / 2; half >= 1; half /= 2) {
    for (int64_t j = 0; j < half; j++) lane[j] += lane[j + half];
  }
  return lane[0];
}

inline float inverse_rms(const float* x, int64_t count, float epsilon) {
  return 1.0f / __builtin_sqrtf(sum_of<true>(x, count) / float(count) + epsilon);
}

inline void norm_row(const float* x, const float* weight, int64_t count, float epsilon, float* y) {
  const float scale = inverse_rms(x, count, epsilon);
  for (int64_t i = 0; i < count; i++) y[i] = x[i] * scale * weight[i];
}

inline void add_rows(const float* a, const float* b, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i++) y[i] = a[i] + b[i];
}

inline void swiglu_rows(const float* __restrict gate_up, int64_t rows, float* __restrict h, int64_t row_stride) {
  for (int64_t row = 0; row < rows; row++, gate_up += 2 * kTileOutputs, h += row_stride) {
    for (int64_t i = 0; i < kTileOutputs; i++) {
      const float gate = gate_up[i];
      h[i] = gate / (1.0f + exp_of(-gate)) * gate_up[kTileOutputs + i];
    }
  }
}

}  // namespace
}  // namespace corral
