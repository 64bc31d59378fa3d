// Kernels for x86-64 with AVX2, FMA and F16C. Only called where dispatch.cc found these.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#include "elementwise.h"
#include "kernels.h"
#include "tile_by_tile.h"

namespace corral {
namespace {

using Bytes = __m256i;

inline Bytes vector(const uint8_t* bytes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)); }
inline Bytes masked(Bytes bytes, int mask) { return _mm256_and_si256(bytes, _mm256_set1_epi8(char(mask))); }
inline Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
// By bits that are masked afterwards: what crosses from byte to byte is not seen.
template <int Bits>
inline Bytes left(Bytes bytes) {
  return Bits ? _mm256_slli_epi16(bytes, Bits) : bytes;
}
template <int Bits>
inline Bytes right(Bytes bytes) {
  return Bits ? _mm256_srli_epi16(bytes, Bits) : bytes;
}

}  // namespace
}  // namespace corral

#include "codes.h"

namespace corral {
namespace {

inline __m256i broadcast(const int8_t* codes) {
  int32_t word;
  std::memcpy(&word, codes, sizeof word);
  return _mm256_set1_epi32(word);
}

struct Int8 {
  static constexpr int32_t kBits = 8, kStep = 8;
};

// Adds the products of a step's fours from `Four` on, two at a time, in 16 bits.
template <class Codes, int Rows, int Four = 0>
inline void add_step(const uint8_t* step, const int8_t* x, int64_t rows, __m256i (&narrow)[Rows][2]) {
  const int8_t* next = x + 4 * rows;
  for (int half = 0; half < 2; half++) {
    const __m256i w = Codes::template load<Four>(step + 32 * half);
    const __m256i w_next = Codes::template load<Four + 1>(step + 32 * half);
    for (int i = 0; i < Rows; i++) {
      const __m256i products = _mm256_maddubs_epi16(w, broadcast(x + 4 * i));
      const __m256i products_next = _mm256_maddubs_epi16(w_next, broadcast(next + 4 * i));
      narrow[i][half] = _mm256_add_epi16(narrow[i][half], _mm256_add_epi16(products, products_next));
    }
  }
  if constexpr (4 * (Four + 2) < Codes::kStep) add_step<Codes, Rows, Four + 2>(step, next + 4 * rows, rows, narrow);
}

// Less the zero points of a group and of one half of the outputs, each in the low 16 of 32 bits, beside zeros. Sums of a
// group's codes fit 16 bits, too (at most 128 * 127), so that madd_epi16 multiplies the two.
inline __m256i minus_zeros(const Tile& tile, int64_t group, int half) {
  const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(tile.zeros + group * kZeroBytes));
  const __m256i zeros = _mm256_and_si256(_mm256_srli_epi32(_mm256_cvtepu8_epi32(pairs), 4 * half), _mm256_set1_epi32(15));
  return _mm256_and_si256(_mm256_sub_epi32(_mm256_setzero_si256(), zeros), _mm256_set1_epi32(0xffff));
}

// Both below give sum((w - zero) * x) over one group of inputs from `first` on, of a tile and `Rows` rows of the panel from
// `row` on; a tile's 16 outputs are two vectors of 8.

// A block's products with codes of up to 4 bits fit 16 bits: maddubs adds two, of 8 fours: 15 * 127 * 2 * 8 = 30480.
template <class Codes, int Rows>
inline void sum_group(Codes, const Tile& tile, const Panel& panel, int64_t row, int64_t first, Inputs inputs,
                      __m256i (&sum)[Rows][2]) {
  const __m256i ones = _mm256_set1_epi16(1);
  const int64_t at = first / inputs.group * panel.rows + row;
  for (int i = 0; i < Rows; i++) {
    sum[i][0] = sum[i][1] = _mm256_set1_epi32(-(1 << (Codes::kBits - 1)) * panel.sums[at + i]);
  }
  if (tile.zeros) {
    for (int half = 0; half < 2; half++) {
      const __m256i zeros = minus_zeros(tile, first / inputs.group, half);
      for (int i = 0; i < Rows; i++) sum[i][half] = _mm256_madd_epi16(zeros, _mm256_set1_epi32(panel.sums[at + i]));
    }
  }
  for (int64_t block = first; block < first + inputs.group; block += kBlock) {
    __m256i narrow[Rows][2];
    for (auto& n : narrow) n[0] = n[1] = _mm256_setzero_si256();
    for (int64_t k = block; k < block + kBlock; k += Codes::kStep) {
      add_step<Codes, Rows>(tile.codes + 2 * Codes::kBits * k, panel.codes + k * panel.rows + 4 * row, panel.rows, narrow);
    }
    for (int i = 0; i < Rows; i++) {
      for (int half = 0; half < 2; half++) {
        sum[i][half] = _mm256_add_epi32(sum[i][half], _mm256_madd_epi16(narrow[i][half], ones));
      }
    }
  }
}

// maddubs takes one factor unsigned: the weight's magnitude, at most 128, whose sign goes to the activation. Two products,
// at most 2 * 128 * 127 = 32512, just fit 16 bits.
template <int Rows>
inline void sum_group(Int8, const Tile& tile, const Panel& panel, int64_t row, int64_t first, Inputs inputs,
                      __m256i (&sum)[Rows][2]) {
  const __m256i zero_point = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
  for (auto& s : sum) s[0] = s[1] = _mm256_setzero_si256();
  for (int64_t k = first; k < first + inputs.group; k += 4) {
    const int8_t* x = panel.codes + k * panel.rows + 4 * row;
    for (int half = 0; half < 2; half++) {
      const __m256i w = _mm256_xor_si256(vector(tile.codes + 16 * k + 32 * half), zero_point);
      const __m256i magnitude = _mm256_abs_epi8(w);
      for (int i = 0; i < Rows; i++) {
        const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(broadcast(x + 4 * i), w));
        sum[i][half] = _mm256_add_epi32(sum[i][half], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
}

// Fetches a group of the tile after this one into the second-level cache: processors stop reading ahead at a page's end. Past
// the end of what is mapped it does nothing.
template <class Codes>
inline void prefetch_next(const Tile& tile, int64_t group, Inputs inputs) {
  const uint8_t* next = tile.codes + 2 * Codes::kBits * (inputs.count + group * inputs.group);
  for (int64_t at = 0; at < 2 * Codes::kBits * inputs.group; at += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(next + at), _MM_HINT_T1);
  }
}

template <class Codes, int Rows>
inline void multiply(const Tile& tile, const Panel& panel, int64_t row, Inputs inputs, float* y, int64_t row_stride) {
  __m256 total[Rows][2];
  for (auto& t : total) t[0] = t[1] = _mm256_setzero_ps();
  for (int64_t group = 0; group < inputs.count / inputs.group; group++) {
    const int64_t at = group * panel.rows + row;
    __m256i sum[Rows][2];
    if (row == 0) prefetch_next<Codes>(tile, group, inputs);
    sum_group(Codes{}, tile, panel, row, group * inputs.group, inputs, sum);
    for (int half = 0; half < 2; half++) {
      const uint16_t* scales = tile.scales + group * kTileOutputs + 8 * half;
      const __m256 weight_scale = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
      for (int i = 0; i < Rows; i++) {
        const __m256 scale = _mm256_mul_ps(weight_scale, _mm256_set1_ps(panel.scales[at + i]));
        total[i][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i][half]), scale, total[i][half]);
      }
    }
  }
  for (int i = 0; i < Rows; i++) {
    _mm256_storeu_ps(y + i * row_stride, total[i][0]);
    _mm256_storeu_ps(y + i * row_stride + 8, total[i][1]);
  }
}

template <class Codes>
void one_tile(const Tile& tile, const Panel& panel, Inputs inputs, float* y, int64_t row_stride) {
  int64_t row = 0;
  for (; row + 4 <= panel.rows; row += 4) multiply<Codes, 4>(tile, panel, row, inputs, y + row * row_stride, row_stride);
  for (; row + 2 <= panel.rows; row += 2) multiply<Codes, 2>(tile, panel, row, inputs, y + row * row_stride, row_stride);
  if (row < panel.rows) multiply<Codes, 1>(tile, panel, row, inputs, y + row * row_stride, row_stride);
}

// --- attention ---

struct Lanes {
  __m256 low, high;
};

inline Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes spread(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store(float* into, Lanes lanes) {
  _mm256_storeu_ps(into, lanes.low);
  _mm256_storeu_ps(into + 8, lanes.high);
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

constexpr int kSums = 4;  // that fit the registers beside what is read

inline void sums(const Lanes* lanes, float* into) {
  for (int i = 0; i < kSums; i++) {
    const __m256 half = _mm256_add_ps(lanes[i].low, lanes[i].high);
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    into[i] = _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
}

}  // namespace
}  // namespace corral

#include "kernel_table.h"

namespace corral {

extern const Kernels kAvx2 = kKernels;

}  // namespace corral
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
