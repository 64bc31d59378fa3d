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

using Bytes = __m512i;

inline Bytes vector(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
inline Bytes masked(Bytes bytes, int mask) { return _mm512_and_si512(bytes, _mm512_set1_epi8(char(mask))); }
inline Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
// By bits that are masked afterwards: what crosses from byte to byte is not seen.
template <int Bits>
inline Bytes left(Bytes bytes) {
  return Bits ? _mm512_slli_epi16(bytes, Bits) : bytes;
}
template <int Bits>
inline Bytes right(Bytes bytes) {
  return Bits ? _mm512_srli_epi16(bytes, Bits) : bytes;
}

}  // namespace
}  // namespace corral

#include "codes.h"

namespace corral {
namespace {

struct Int8 {
  static constexpr int32_t kBits = 8, kStep = 8;

  template <int Four>
  static inline Bytes load(const uint8_t* step) {
    return vector(step + 64 * Four);
  }
};

inline __m512i broadcast(const int8_t* codes) {
  int32_t word;
  std::memcpy(&word, codes, sizeof word);
  return _mm512_set1_epi32(word);
}

// Adds the products of a step's fours from `Four` on, to each of the sums in turn.
template <class Codes, int Rows, int Tiles, int Sums, int Four = 0>
inline void add_step(const uint8_t* const* steps, const int8_t* x, __m512i (&sum)[Sums][Rows][Tiles]) {
  for (int t = 0; t < Tiles; t++) {
    const __m512i w = Codes::template load<Four>(steps[t]);
    for (int i = 0; i < Rows; i++) {
      __m512i& into = sum[Four % Sums][i][t];
      into = _mm512_dpbusd_epi32(into, w, broadcast(x + 4 * (Four * Rows + i)));
    }
  }
  if constexpr (4 * (Four + 1) < Codes::kStep) add_step<Codes, Rows, Tiles, Sums, Four + 1>(steps, x, sum);
}

// Less the zero points of a group, each in the low 16 of 32 bits, beside zeros. Sums of a group's codes fit 16 bits, too (at
// most 128 * 127), so that madd_epi16 multiplies the two.
inline __m512i minus_zeros(const Tile& tile, int64_t group) {
  const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(tile.zeros + group * kZeroBytes));
  const __m128i both = _mm_unpacklo_epi64(pairs, _mm_srli_epi16(pairs, 4));
  const __m512i zeros = _mm512_cvtepu8_epi32(_mm_and_si128(both, _mm_set1_epi8(15)));
  return _mm512_maskz_sub_epi16(0x55555555, _mm512_setzero_si512(), zeros);
}

// Into the second-level cache. Past the end of what is mapped it does nothing.
inline void prefetch(const void* line) { _mm_prefetch(static_cast<const char*>(line), _MM_HINT_T1); }

// A panel of exactly `Rows` rows by `Tiles` tiles; a tile's 16 outputs are one vector.
template <class Codes, int Rows, int Tiles>
inline void multiply(const Tile* tiles, const Panel& panel, Inputs inputs, float* y, int64_t row_stride) {
  // A few sums would wait for each other: then there are several of each.
  constexpr int sums = Rows * Tiles <= 2 ? 4 : Rows * Tiles <= 4 ? 2 : 1;
  // The tile that each of these is followed by is fetched meanwhile. Processors stop reading ahead at a page's end, and where
  // two neighbours are read at once, at every tile's.
  const int64_t tile_bytes = 2 * Codes::kBits * inputs.count, groups = inputs.count / inputs.group;
  const bool neighbours = Tiles == 2 && tiles[0].codes + tile_bytes == tiles[Tiles - 1].codes;
  const int64_t tiles_ahead = neighbours ? 2 : 1;
  __m512 total[Rows][Tiles];
  for (auto& row : total) {
    for (__m512& t : row) t = _mm512_setzero_ps();
  }
  for (int64_t group = 0; group < groups; group++) {
    const int64_t first = group * inputs.group, at = group * Rows;
    __m512i sum[sums][Rows][Tiles];
    for (int i = 0; i < Rows; i++) {
      for (int t = 0; t < Tiles; t++) {
        sum[0][i][t] = _mm512_set1_epi32(-(1 << (Codes::kBits - 1)) * panel.sums[at + i]);
        for (int s = 1; s < sums; s++) sum[s][i][t] = _mm512_setzero_si512();
      }
    }
    if (tiles[0].zeros) {  // all tiles of a matrix have some, or none
      for (int t = 0; t < Tiles; t++) {
        const __m512i zeros = minus_zeros(tiles[t], group);
        for (int i = 0; i < Rows; i++) sum[0][i][t] = _mm512_madd_epi16(zeros, _mm512_set1_epi32(panel.sums[at + i]));
      }
    }
    for (int64_t k = first; k < first + inputs.group; k += Codes::kStep) {
      const uint8_t* steps[Tiles];
      for (int t = 0; t < Tiles; t++) {
        steps[t] = tiles[t].codes + 2 * Codes::kBits * k;
        for (int line = 0; line < Codes::kBits * Codes::kStep / 32; line++) {
          prefetch(steps[t] + tiles_ahead * tile_bytes + 64 * line);
        }
      }
      add_step<Codes, Rows, Tiles, sums>(steps, panel.codes + k * Rows, sum);
    }
    for (int t = 0; t < Tiles; t++) {
      const uint16_t* scales = tiles[t].scales + group * kTileOutputs;
      const __m512 weight_scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
      for (int i = 0; i < Rows; i++) {
        __m512i whole = sum[0][i][t];
        for (int s = 1; s < sums; s++) whole = _mm512_add_epi32(whole, sum[s][i][t]);
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
static_assert(sizeof kOne<Int4> / sizeof(ByRows) == kPanelRows && sizeof kTwo<Int4> / sizeof(ByRows) == kPanelRows);

template <class Codes>
void one_tile(const Tile& tile, const Panel& panel, Inputs inputs, float* y, int64_t row_stride) {
  kOne<Codes>[panel.rows - 1](&tile, panel, inputs, y, row_stride);
}

template <class Codes>
void two_tiles(const Tile& first, const Tile& second, const Panel& panel, Inputs inputs, float* y, int64_t row_stride) {
  const Tile tiles[] = {first, second};
  kTwo<Codes>[panel.rows - 1](tiles, panel, inputs, y, row_stride);
}

// --- attention ---

struct Lanes {
  __m512 v;
};

inline Lanes zero() { return {_mm512_setzero_ps()}; }
inline Lanes spread(float value) { return {_mm512_set1_ps(value)}; }
inline Lanes load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline void store(float* into, Lanes lanes) { _mm512_storeu_ps(into, lanes.v); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

constexpr int kSums = 16;  // that fit the registers beside what is read

// Sixteen sums at once: each step halves what is left of two vectors into one.
inline void sums(const Lanes* lanes, float* into) {
  __m512 half[8], quarter[4], pair[2];
  for (int i = 0; i < 8; i++) {
    const __m512 a = lanes[i].v, b = lanes[i + 8].v;
    half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  for (int i = 0; i < 4; i++) {
    const __m512 a = half[i], b = half[i + 4];
    quarter[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  for (int i = 0; i < 2; i++) {
    const __m512d a = _mm512_castps_pd(quarter[i]), b = _mm512_castps_pd(quarter[i + 2]);
    pair[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(pair[0], pair[1], 0x88), _mm512_shuffle_ps(pair[0], pair[1], 0xdd));
  const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
  _mm512_storeu_ps(into, _mm512_permutexvar_ps(order, all));
}

}  // namespace
}  // namespace corral

#include "kernel_table.h"

namespace corral {

extern const Kernels kAvx512Vnni = kKernels;

}  // namespace corral
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
