#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "buffer.h"

namespace corral {
namespace {

// Partials of so many floats are kept at a time, few enough for a cache: a prompt is gone through in slabs.
constexpr int64_t kPartialFloats = 256 << 10;
constexpr int64_t kFetchedBytes = 256 << 10;  // of a cache that holds other things, too

// One call. The queries of a kv head are kept together, token by token: [batch, kv_heads, tokens * group, dim].
class Call {
 public:
  Call(const AttentionKernels& kernels, const ort::Workers& workers, const AttentionShape& shape,
       const AttentionInputs& inputs, const AttentionCaches& caches)
      : kernels_(kernels),
        workers_(workers),
        shape_(shape),
        inputs_(inputs),
        caches_(caches),
        rows_(shape.tokens * shape.group()),
        queries_(shape.batch * shape.kv_heads * rows_ * shape.dim) {}

  // One token of a sequence sees many rows and computes little with each: the first keys are fetched while it is placed.
  void fetch_first_keys() const {
    if (shape_.tokens > 1) return;
    int64_t left = kFetchedBytes;
    for (int64_t cache = 0; cache < shape_.batch * shape_.kv_heads && left > 0; cache++) {
      const int64_t sequence = cache / shape_.kv_heads, rows = std::min(inputs_.past_length[sequence], kBlockRows);
      left -= fetch(caches_.row(caches_.keys, shape_, sequence, cache % shape_.kv_heads, 0), rows * caches_.row_bytes);
    }
  }

  void place_tokens() {
    const int64_t tokens = shape_.batch * shape_.tokens;
    workers_.each_worth(tokens, 4 * tokens * (shape_.heads + shape_.kv_heads) * shape_.dim,
                        [&](size_t i) { place_token(int64_t(i) / shape_.tokens, int64_t(i) % shape_.tokens); });
  }

  void attend(float* y) {
    const int64_t tile_rows = std::min(kBlockQueries, rows_), tiles = (rows_ + tile_rows - 1) / tile_rows;
    const int64_t caches = shape_.batch * shape_.kv_heads;
    const int64_t longest = *std::max_element(inputs_.past_length, inputs_.past_length + shape_.batch);
    const int64_t blocks = block_count(longest + shape_.tokens);
    const int64_t stride = tile_rows * (shape_.dim + kPartialExtra);  // of a block's partials
    const int64_t slab = std::clamp<int64_t>(kPartialFloats / (caches * blocks * stride), 1, tiles);
    Buffer<float> partials(caches * slab * blocks * stride);
    for (int64_t first = 0; first < tiles; first += slab) {
      const int64_t count = std::min(slab, tiles - first), tasks = caches * count;
      const auto tile_of = [&](int64_t task) {
        const int64_t tile = first + task % count;
        return Tile{task / count, tile * tile_rows, std::min(tile_rows, rows_ - tile * tile_rows),
                    partials.get() + task * blocks * stride};
      };
      const int64_t scored = tasks * tile_rows * blocks * kBlockRows * shape_.dim;
      workers_.each_worth(tasks * blocks, scored, [&](size_t i) {
        const Tile tile = tile_of(int64_t(i) / blocks);
        const int64_t block = int64_t(i) % blocks;
        attend_block(tile, block, tile.partials + block * stride);
      });
      workers_.each_worth(tasks, tasks * stride * blocks, [&](size_t i) { merge_blocks(tile_of(int64_t(i)), stride, y); });
    }
  }

 private:
  // Some consecutive query rows of one cache, of one sequence and kv head.
  struct Tile {
    int64_t cache, first, count;
    float* partials;
  };

  static int64_t fetch(const uint8_t* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += Scratch::kLine) __builtin_prefetch(from + at, 0, 2);
    return bytes;
  }

  static int64_t block_count(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

  // The cache rows that a query row sees: those before its token, and its own.
  int64_t seen(int64_t cache, int64_t query) const {
    return inputs_.past_length[cache / shape_.kv_heads] + query / shape_.group() + 1;
  }

  void place_token(int64_t sequence, int64_t token) {
    const int64_t at = sequence * shape_.tokens + token, dim = shape_.dim, group = shape_.group();
    const float* q = inputs_.qkv + at * (shape_.heads + 2 * shape_.kv_heads) * dim;
    const float *k = q + shape_.heads * dim, *v = k + shape_.kv_heads * dim;
    const Rotation rotation{inputs_.cos ? inputs_.cos + at * dim / 2 : nullptr,
                            inputs_.sin ? inputs_.sin + at * dim / 2 : nullptr, inputs_.epsilon};
    const float temperature = inputs_.temperature ? inputs_.temperature[at] : 1.0f;
    const float gain = temperature / std::sqrt(float(dim));
    for (int64_t head = 0; head < shape_.heads; head++) {
      const int64_t cache = sequence * shape_.kv_heads + head / group, row = token * group + head % group;
      kernels_.place(q + head * dim, rotation, dim, gain, queries_.get() + (cache * rows_ + row) * dim);
    }
    const int64_t row = inputs_.past_length[sequence] + token;
    for (int64_t head = 0; head < shape_.kv_heads; head++) {
      float key[kLargestHead];
      kernels_.place(k + head * dim, rotation, dim, 1.0f, key);
      write(key, caches_.row(caches_.keys, shape_, sequence, head, row));
      write(v + head * dim, caches_.row(caches_.values, shape_, sequence, head, row));
    }
  }

  void write(const float* values, uint8_t* row) const {
    if (caches_.codec) {
      caches_.codec->store(values, shape_.dim, row);
    } else {
      std::memcpy(row, values, size_t(caches_.row_bytes));
    }
  }

  void attend_block(const Tile& tile, int64_t block, float* partials) const {
    const int64_t first = block * kBlockRows;
    const int64_t rows = std::min(kBlockRows, seen(tile.cache, tile.first + tile.count - 1) - first);
    if (rows <= 0) return;
    int64_t visible[kBlockQueries];
    for (int64_t i = 0; i < tile.count; i++) {
      visible[i] = std::clamp<int64_t>(seen(tile.cache, tile.first + i) - first, 0, rows);
    }
    const int64_t sequence = tile.cache / shape_.kv_heads, head = tile.cache % shape_.kv_heads;
    const uint8_t* keys = caches_.row(caches_.keys, shape_, sequence, head, first);
    const uint8_t* values = caches_.row(caches_.values, shape_, sequence, head, first);
    const float* queries = queries_.get() + (tile.cache * rows_ + tile.first) * shape_.dim;
    if (shape_.tokens == 1) fetch(values, rows * caches_.row_bytes);  // while scores are computed
    AttentionBlock work{queries, visible, tile.count, nullptr, nullptr, rows, shape_.dim};
    if (!caches_.codec) {
      work.keys = reinterpret_cast<const float*>(keys);
      work.values = reinterpret_cast<const float*>(values);
      return kernels_.attend(work, partials);
    }
    alignas(64) float key_floats[kBlockRows * kLargestHead], value_floats[kBlockRows * kLargestHead];
    caches_.codec->load(keys, rows, shape_.dim, key_floats);
    caches_.codec->load(values, rows, shape_.dim, value_floats);
    work.keys = key_floats;
    work.values = value_floats;
    kernels_.attend(work, partials);
  }

  void merge_blocks(const Tile& tile, int64_t stride, float* y) const {
    const int64_t sequence = tile.cache / shape_.kv_heads, kv_head = tile.cache % shape_.kv_heads, group = shape_.group();
    for (int64_t i = 0; i < tile.count; i++) {
      const int64_t query = tile.first + i, token = query / group, head = kv_head * group + query % group;
      kernels_.merge(tile.partials + i * (shape_.dim + kPartialExtra), block_count(seen(tile.cache, query)), stride,
                     shape_.dim, y + ((sequence * shape_.tokens + token) * shape_.heads + head) * shape_.dim);
    }
  }

  const AttentionKernels& kernels_;
  const ort::Workers& workers_;
  const AttentionShape& shape_;
  const AttentionInputs& inputs_;
  const AttentionCaches& caches_;
  int64_t rows_;
  Buffer<float> queries_;
};

}  // namespace

void attention(const AttentionKernels& kernels, const ort::Workers& workers, const AttentionShape& shape,
               const AttentionInputs& inputs, const AttentionCaches& caches, float* y) {
  if (!shape.batch || !shape.tokens) return;
  Call call(kernels, workers, shape, inputs, caches);
  call.fetch_first_keys();
  call.place_tokens();
  call.attend(y);
}

}  // namespace corral
