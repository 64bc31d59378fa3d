// Rows of a cache in 8 or 4 bits, for the compiler to vectorize for each instruction set; as elementwise.h.
//
// A row of `dim` values is cut into groups of at most 128 (8 bits) or 32 (4 bits). Its bytes are the codes, then for each
// group a scale in fp16: value = scale * code. Codes are symmetric; of 4 bits they are stored with 8 added, a group's first
// half in the low halves of its bytes. A row of zero bytes is finite. A scale that fp16 cannot hold is infinite, so that
// values beyond 65504 times the largest code are read as not finite rather than as something else.
#pragma once

#include "elementwise.h"
#include "kernels.h"

namespace corral {
namespace {

template <int bits>
struct CacheRow {
  static constexpr int32_t kLargestCode = bits == 8 ? 127 : 7;
  static constexpr int64_t kGroup = bits == 8 ? 128 : 32;

  static int64_t group(int64_t dim) { return dim < kGroup ? dim : kGroup; }
  static int64_t code_bytes(int64_t dim) { return dim * bits / 8; }
  static int64_t bytes(int64_t dim) { return code_bytes(dim) + dim / group(dim) * 2; }

  static void store(const float* values, int64_t dim, uint8_t* row) {
    const int64_t size = group(dim);
    for (int64_t g = 0; g < dim / size; g++, values += size) {
      const uint16_t half = half_of(largest_of(values, size) / float(kLargestCode));
      const float scale = float_of_half(half);
      const float per_code = scale > 0 ? 1.0f / scale : 0.0f;
      int8_t codes[kGroup];
      for (int64_t i = 0; i < size; i++) {
        const int32_t code = int32_t(bits_of(values[i] * per_code + kRound) - kRoundBits);
        codes[i] = int8_t(code > kLargestCode ? kLargestCode : code < -kLargestCode ? -kLargestCode : code);
      }
      uint8_t* into = row + code_bytes(size) * g;
      if (bits == 8) {
        std::memcpy(into, codes, size_t(size));
      } else {
        for (int64_t i = 0; i < size / 2; i++) into[i] = uint8_t((codes[i] + 8) | (codes[i + size / 2] + 8) << 4);
      }
      std::memcpy(row + code_bytes(dim) + 2 * g, &half, sizeof half);
    }
  }

  static void load(const uint8_t* rows, int64_t count, int64_t dim, float* values) {
    const int64_t size = group(dim);
    for (int64_t r = 0; r < count; r++, rows += bytes(dim)) {
      for (int64_t g = 0; g < dim / size; g++, values += size) {
        uint16_t half;
        std::memcpy(&half, rows + code_bytes(dim) + 2 * g, sizeof half);
        const float scale = float_of_half(half);
        const uint8_t* codes = rows + code_bytes(size) * g;
        if (size == kGroup) {  // a loop of a constant length
          load_group(codes, kGroup, scale, values);
        } else {
          load_group(codes, size, scale, values);
        }
      }
    }
  }

 private:
  static inline void load_group(const uint8_t* __restrict codes, int64_t size, float scale, float* __restrict values) {
    if (bits == 8) {
      for (int64_t i = 0; i < size; i++) values[i] = float(int8_t(codes[i])) * scale;
    } else {
      for (int64_t i = 0; i < size / 2; i++) values[i] = float(int32_t(codes[i] & 15) - 8) * scale;
      for (int64_t i = 0; i < size / 2; i++) values[i + size / 2] = float(int32_t(codes[i] >> 4) - 8) * scale;
    }
  }

  // Magnitudes compare like their bits, and what is not a number is above infinity.
  static float largest_of(const float* values, int64_t count) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
      const int32_t magnitude = int32_t(bits_of(values[i]) & 0x7fffffffu);
      largest = magnitude > largest ? magnitude : largest;
    }
    return float_of(uint32_t(largest));
  }
};

}  // namespace
}  // namespace corral
