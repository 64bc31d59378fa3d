// Kernels for x86-64 with AVX-512 (F, BW, DQ, VL) and its int8 dot products. Only called where dispatch.cc found these.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#endif
#include <immintrin.h>

#include "elementwise.h"
#include "kernels.h"

namespace corral {
namespace {

constexpr int64_t kPrefetchBytes = 3072;  // ahead of the tile being read; past the end it does nothing

inline __m512i broadcast(const int8_t* codes) {
  int32_t word;
  std::memcpy(&word, codes, sizeof word);
  return _mm512_set1_epi32(word);
}

// A tile's codes of 8 inputs: of the first 4 and of the others.
struct Nibbles {
  static constexpr int64_t kBytesOf8 = 64;
  static constexpr int32_t kZero = 8;

  static inline void load(const uint8_t* codes, __m512i& low, __m512i& high) {
    const __m512i w = _mm512_loadu_si512(codes), low_half = _mm512_set1_epi8(15);
    low = _mm512_and_si512(w, low_half);
    high = _mm512_and_si512(_mm512_srli_epi16(w, 4), low_half);
  }
};

struct Bytes {
  static constexpr int64_t kBytesOf8 = 128;
  static constexpr int32_t kZero = 128;

  static inline void load(const uint8_t* codes, __m512i& low, __m512i& high) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + 64 + kPrefetchBytes), _MM_HINT_T0);
    low = _mm512_loadu_si512(codes);
    high = _mm512_loadu_si512(codes + 64);
  }
};

// A panel of exactly `Rows` rows by `Tiles` tiles; a tile's 16 outputs are one vector.
template <class Codes, int Rows, int Tiles>
inline void multiply(const Tile* tiles, const Panel& panel, Inputs inputs, float* y, int64_t row_stride) {
  // Few accumulators would wait for each other: then low and high halves are summed apart.
  constexpr bool apart = Rows * Tiles <= 4;
  __m512 total[Rows][Tiles];
  for (auto& row : total) {
    for (__m512& t : row) t = _mm512_setzero_ps();
  }
  for (int64_t group = 0; group < inputs.count / inputs.group; group++) {
    const int64_t first = group * inputs.group, at = group * Rows;
    __m512i sum[Rows][Tiles], sum_high[apart ? Rows : 1][Tiles];
    for (int i = 0; i < Rows; i++) {
      for (int t = 0; t < Tiles; t++) {
        sum[i][t] = _mm512_set1_epi32(-Codes::kZero * panel.sums[at + i]);
        if (apart) sum_high[apart ? i : 0][t] = _mm512_setzero_si512();
      }
    }
    for (int64_t k = first; k < first + inputs.group; k += 8) {
      const int8_t *x_low = panel.codes + k * Rows, *x_high = x_low + 4 * Rows;
      for (int t = 0; t < Tiles; t++) {
        const uint8_t* codes = tiles[t].codes + k / 8 * Codes::kBytesOf8;
        _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetchBytes), _MM_HINT_T0);
        __m512i low, high;
        Codes::load(codes, low, high);
        for (int i = 0; i < Rows; i++) {
          sum[i][t] = _mm512_dpbusd_epi32(sum[i][t], low, broadcast(x_low + 4 * i));
          __m512i& into = apart ? sum_high[apart ? i : 0][t] : sum[i][t];
          into = _mm512_dpbusd_epi32(into, high, broadcast(x_high + 4 * i));
        }
      }
    }
    for (int t = 0; t < Tiles; t++) {
      const uint16_t* scales = tiles[t].scales + group * kTileOutputs;
      const __m512 weight_scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
      for (int i = 0; i < Rows; i++) {
        const __m512i whole = apart ? _mm512_add_epi32(sum[i][t], sum_high[apart ? i : 0][t]) : sum[i][t];
        const __m512 scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(panel.scales[at + i]));
        total[i][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale, total[i][t]);
      }
    }
  }
  for (int i = 0; i < Rows; i++) {
    for (int t = 0; t < Tiles; t++) _mm512_storeu_ps(y + i * row_stride + t * kTileOutputs, total[i][t]);
  }
}

template <class Codes, int Rows>
void one(const Tile* tiles, const Panel& panel, Inputs inputs, float* y, int64_t row_stride) {
  multiply<Codes, Rows, 1>(tiles, panel, inputs, y, row_stride);
}

// Both tiles at once while accumulators and totals fit 32 registers.
template <class Codes, int Rows>
void two(const Tile* tiles, const Panel& panel, Inputs inputs, float* y, int64_t row_stride) {
  if constexpr (Rows <= 6) {
    multiply<Codes, Rows, 2>(tiles, panel, inputs, y, row_stride);
  } else {
    multiply<Codes, Rows, 1>(tiles, panel, inputs, y, row_stride);
    multiply<Codes, Rows, 1>(tiles + 1, panel, inputs, y + kTileOutputs, row_stride);
  }
}

using ByRows = void (*)(const Tile*, const Panel&, Inputs, float*, int64_t);
template <class C>
constexpr ByRows kOne[] = {one<C, 1>, one<C, 2>, one<C, 3>, one<C, 4>,  one<C, 5>,  one<C, 6>,
                           one<C, 7>, one<C, 8>, one<C, 9>, one<C, 10>, one<C, 11>, one<C, 12>};
template <class C>
constexpr ByRows kTwo[] = {two<C, 1>, two<C, 2>, two<C, 3>, two<C, 4>,  two<C, 5>,  two<C, 6>,
                           two<C, 7>, two<C, 8>, two<C, 9>, two<C, 10>, two<C, 11>, two<C, 12>};
static_assert(sizeof kOne<Nibbles> / sizeof(ByRows) == kPanelRows && sizeof kTwo<Nibbles> / sizeof(ByRows) == kPanelRows);

template <class Codes>
void one_tile(const Tile& tile, const Panel& panel, Inputs inputs, float* y, int64_t row_stride) {
  kOne<Codes>[panel.rows - 1](&tile, panel, inputs, y, row_stride);
}

template <class Codes>
void two_tiles(const Tile& first, const Tile& second, const Panel& panel, Inputs inputs, float* y, int64_t row_stride) {
  const Tile tiles[] = {first, second};
  kTwo<Codes>[panel.rows - 1](tiles, panel, inputs, y, row_stride);
}

}  // namespace

extern const Kernels kAvx512Vnni{
    quantize_row, {one_tile<Nibbles>, two_tiles<Nibbles>}, {one_tile<Bytes>, two_tiles<Bytes>}, swiglu_rows};

}  // namespace corral
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
