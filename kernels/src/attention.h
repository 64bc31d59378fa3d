// Causal attention of new tokens over a cache that already holds the others of their chunk or sequence.
#pragma once

#include <vector>

#include "kernels.h"
#include "ort_api.h"

namespace corral {

struct AttentionShape {
  int64_t batch, tokens, heads, kv_heads, dim;
  int64_t capacity;  // rows of each head's cache

  int64_t group() const { return heads / kv_heads; }  // query heads that share a key and value head
};

struct AttentionInputs {
  const float* qkv;               // [batch, tokens, (heads + 2 kv_heads) dim]: all queries, all keys, all values
  const int64_t* past_length;     // [batch]: rows filled before these tokens; with them at most the capacity
  const float *cos, *sin;         // [batch, tokens, dim / 2], or null
  const float* temperature;       // [batch, tokens], or null
  float epsilon;                  // of the norm of queries and keys after the rotation; 0: none
};

// The rows of all sequences and heads [batch, kv_heads, capacity] of floats [dim], or as `codec` stores them.
struct AttentionCaches {
  uint8_t *keys, *values;
  const RowCodec* codec;  // null: floats
  int64_t row_bytes;

  uint8_t* row(uint8_t* rows, const AttentionShape& shape, int64_t sequence, int64_t kv_head, int64_t at) const {
    return rows + ((sequence * shape.kv_heads + kv_head) * shape.capacity + at) * row_bytes;
  }
};

// Writes the new tokens' rows into the caches, then y [batch, tokens, heads dim]. Throws std::bad_alloc.
void attention(const AttentionKernels& kernels, const ort::Workers& workers, const AttentionShape& shape,
               const AttentionInputs& inputs, const AttentionCaches& caches, float* y);

}  // namespace corral
