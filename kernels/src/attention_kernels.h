// Attention over blocks of a cache, written once: a kernel file includes this after it has said what sixteen `Lanes` are
// (zero, spread, load, store, fma, sums of kSums of them). In an unnamed namespace, as elementwise.h.
//
// Every sum has one order whatever the batch, the threads, the number of new tokens or the instruction set: a score adds
// up in lanes and then by halves, weighed values are added row by row, blocks begin at multiples of kBlockRows.
#pragma once

#include "cache_rows.h"
#include "elementwise.h"
#include "kernels.h"

namespace corral {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();

// e^x as the weight of a score; unlike exp_of, not a number where x is not.
inline float weight_of(float x) { return exp_of(x) + (x - x); }

inline void place(const float* x, const Rotation& rotation, int64_t dim, float gain, float* y) {
  if (rotation.cos) {
    for (int64_t i = 0; i < dim / 2; i++) {
      const float even = x[2 * i], odd = x[2 * i + 1], cos = rotation.cos[i], sin = rotation.sin[i];
      y[2 * i] = even * cos - odd * sin;
      y[2 * i + 1] = even * sin + odd * cos;
    }
  } else {
    std::memcpy(y, x, size_t(dim) * sizeof *y);
  }
  if (rotation.epsilon > 0) gain *= inverse_rms(y, dim, rotation.epsilon);
  for (int64_t i = 0; i < dim; i++) y[i] *= gain;
}

// Scores of `Queries` queries from `query` on with the next kSums / Queries rows.
template <int Queries>
inline void score(const AttentionBlock& block, int64_t query, int64_t row, float* scores) {
  constexpr int rows = kSums / Queries;
  const float* key[rows];
  for (int r = 0; r < rows; r++) {  // past the last row it is read again, and never looked at
    const int64_t at = row + r < block.rows ? row + r : block.rows - 1;
    key[r] = block.keys + at * block.dim;
  }
  const float* x = block.queries + query * block.dim;
  Lanes products[kSums];
  for (Lanes& lanes : products) lanes = zero();
  for (int64_t d = 0; d < block.dim; d += kLanes) {
    Lanes part[Queries];
    for (int q = 0; q < Queries; q++) part[q] = load(x + q * block.dim + d);
    for (int r = 0; r < rows; r++) {
      const Lanes k = load(key[r] + d);
      for (int q = 0; q < Queries; q++) products[q * rows + r] = fma(part[q], k, products[q * rows + r]);
    }
  }
  float found[kSums];
  sums(products, found);
  for (int q = 0; q < Queries; q++) {
    for (int r = 0; r < rows; r++) scores[q * kBlockRows + row + r] = found[q * rows + r];
  }
}

// The first `rows` rows of values, weighed for `Queries` queries, in `Vectors` times 16 places from `d` on.
template <int Queries, int Vectors>
inline void weigh(const AttentionBlock& block, int64_t query, int64_t rows, int64_t d, const float* weights,
                  float* partials) {
  Lanes total[Queries][Vectors];
  for (auto& of_query : total) {
    for (Lanes& lanes : of_query) lanes = zero();
  }
  for (int64_t r = 0; r < rows; r++) {
    Lanes value[Vectors];
    for (int v = 0; v < Vectors; v++) value[v] = load(block.values + r * block.dim + d + v * kLanes);
    for (int q = 0; q < Queries; q++) {
      const Lanes weight = spread(weights[q * kBlockRows + r]);
      for (int v = 0; v < Vectors; v++) total[q][v] = fma(weight, value[v], total[q][v]);
    }
  }
  for (int q = 0; q < Queries; q++) {
    for (int v = 0; v < Vectors; v++) {
      store(partials + (query + q) * (block.dim + kPartialExtra) + d + v * kLanes, total[q][v]);
    }
  }
}

// Scores -> weights, zero where a query does not see the row; the partial's sum of weights and largest score.
inline void soften(float* scores, int64_t visible, int64_t padded, float* total, float* largest) {
  for (int64_t r = visible; r < padded; r++) scores[r] = kMinusInfinity;
  float lane[kLanes];
  for (float& most : lane) most = kMinusInfinity;
  for (int64_t r = 0; r < padded; r += kLanes) {
    for (int64_t j = 0; j < kLanes; j++) lane[j] = scores[r + j] > lane[j] ? scores[r + j] : lane[j];
  }
  float most = kMinusInfinity;
  for (const float other : lane) most = other > most ? other : most;
  for (int64_t r = 0; r < padded; r++) scores[r] = weight_of(scores[r] - most);
  for (int64_t r = visible; r < padded; r++) scores[r] = 0;
  *total = sum_of<false>(scores, padded);
  *largest = most;
}

template <int Queries>
inline void attend_queries(const AttentionBlock& block, int64_t query, float* partials) {
  constexpr int vectors = kSums / Queries < 4 ? kSums / Queries : 4;
  alignas(64) float scores[Queries * kBlockRows];
  int64_t seen = 0;
  for (int q = 0; q < Queries; q++) seen = block.visible[query + q] > seen ? block.visible[query + q] : seen;
  const int64_t padded = (seen + kLanes - 1) / kLanes * kLanes;
  for (int64_t row = 0; row < seen; row += kSums / Queries) score<Queries>(block, query, row, scores);
  for (int q = 0; q < Queries; q++) {
    float* sums = partials + (query + q) * (block.dim + kPartialExtra) + block.dim;
    soften(scores + q * kBlockRows, block.visible[query + q], padded, sums, sums + 1);
  }
  int64_t d = 0;
  for (; d + vectors * kLanes <= block.dim; d += vectors * kLanes) {
    weigh<Queries, vectors>(block, query, seen, d, scores, partials);
  }
  for (; d < block.dim; d += kLanes) weigh<Queries, 1>(block, query, seen, d, scores, partials);
}

inline void attend(const AttentionBlock& block, float* partials) {
  constexpr int most = kSums == 16 ? 4 : 2;
  int64_t query = 0;
  for (; query + most <= block.count; query += most) attend_queries<most>(block, query, partials);
  for (; query + 2 <= block.count; query += 2) attend_queries<2>(block, query, partials);
  if (query < block.count) attend_queries<1>(block, query, partials);
}

inline void merge(const float* partials, int64_t blocks, int64_t stride, int64_t dim, float* y) {
  float largest = kMinusInfinity, total = 0;
  for (int64_t d = 0; d < dim; d++) y[d] = 0;
  for (int64_t block = 0; block < blocks; block++, partials += stride) {
    const float most = partials[dim + 1] > largest ? partials[dim + 1] : largest;
    const float before = exp_of(largest - most), now = exp_of(partials[dim + 1] - most);
    total = total * before + partials[dim] * now;
    for (int64_t d = 0; d < dim; d++) y[d] = y[d] * before + partials[d] * now;
    largest = most;
  }
  const float share = 1.0f / total;
  for (int64_t d = 0; d < dim; d++) y[d] *= share;
}

template <int bits>
constexpr RowCodec kCodec{CacheRow<bits>::kGroup, CacheRow<bits>::bytes, CacheRow<bits>::store, CacheRow<bits>::load};

constexpr AttentionKernels kAttention{place, attend, merge, kCodec<8>, kCodec<4>};

}  // namespace
}  // namespace corral
