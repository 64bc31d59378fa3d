// The product both expert kernels share: weights of one expert times the tokens that visit it.
//
//     C[outputs, tokens] = W[expert][outputs, inputs] * X[tokens, inputs]^T
//
// Weights are the left operand of mma.m16n8k16 and tokens the right one, so a tile needs 8 tokens, not 16, and one kernel
// serves decode (8 tokens a tile, the block's 8 warps split the inputs) and prefill (64 tokens a tile, the warps split
// the outputs). An expert that nobody visits is never read. Accumulation is in fp32; sums over warps are in a fixed
// order, without atomics: two runs give equal bytes.
//
// Storage of weights (graphs/quantize/fragments.py writes it): tiles of 16 outputs by 64 inputs, each in the order in
// which the lanes of a warp hold it, so that a lane reads 16 bytes, a warp 512 in a row, and nothing is shuffled.
// With g = lane / 4 and t = lane % 4, element i of register r = 2 * p + upper of the tile's j-th mma is
//
//     W[16 * tile + 8 * upper + g][64 * step + 16 * t + 4 * j + 2 * p + i]
//
// (inputs are permuted within a step of 64; tokens are read in the same order, and a sum does not mind).
//     codes [expert][tile][step][load][lane][16 bytes], 1, 2 or 4 loads for 4, 8 or 16 bits a weight:
//       int4  32-bit word j, nibble r + 4 * i, zero point 8
//       e4m3  load j / 2, word 2 * (j % 2) + p, byte upper + 2 * i
//       fp16  load j, 32-bit word r, half i
//     scales [expert][tile][group][g][upper]: fp16 for int4 (value = fp16((code - 8) * scale), as DequantizeLinear has
//       it), fp32 and one group for e4m3 (one scale an output), none for fp16.
//
// WEIGHT_BITS, TOKENS, SPLIT_K, ROW_WARPS, ROW_TILES and BLOCKS are macros of the compiler's command: launch.py has the
// table of weight formats and tilings.
#ifndef CORRAL_GROUPED_PRODUCT_CUH
#define CORRAL_GROUPED_PRODUCT_CUH

#include "device.cuh"

constexpr int kTokens = TOKENS;             // of a tile
constexpr int kSplit = SPLIT_K;             // warps that share the inputs; their sums are added at the end
constexpr int kRowWarps = ROW_WARPS;        // warps that share the outputs
constexpr int kRowTiles = ROW_TILES;        // tiles of 16 outputs a warp
constexpr int kBlocks = BLOCKS;             // that should fit on a multiprocessor at once: bounds the registers
constexpr int kWarps = kSplit * kRowWarps;
constexpr int kThreads = kWarps * 32;
constexpr int kGroup = kRowWarps * 32;      // threads that work on the same part of the inputs
constexpr int kColumns = kTokens / 8;       // mma columns of a tile
constexpr int kStep = 64;                   // inputs a step
constexpr int kChunks = kStep / 8;          // 16-byte chunks of a token a step
constexpr int kStages = 4;                  // steps of tokens in shared memory
constexpr int kCopies = kTokens * kChunks / kGroup;
constexpr int kLoads = WEIGHT_BITS / 4;     // 16-byte loads a lane for one tile and step
// Steps of weights in registers: enough bytes in flight for decode, what registers allow for prefill.
constexpr int kAhead = kSplit == 1 ? 1 : WEIGHT_BITS == 4 ? 4 : 2;

static_assert(kTokens % 8 == 0 && kCopies * kGroup == kTokens * kChunks, "tiling");
static_assert(WEIGHT_BITS == 4 || WEIGHT_BITS == 8 || WEIGHT_BITS == 16, "weight format");

#if WEIGHT_BITS == 8
using Scale = float2;
#else
using Scale = __half2;
#endif

// Some visits of one expert: positions first ... first + tokens - 1 of the sorted visits.
struct Tile {
  int expert, first, tokens;
};

// The two operands. `rows` are what tokens come in as, [any number, inputs]; outputs are a multiple of 64, as inputs are.
struct Operands {
  const __half* rows;
  const uint4* codes;
  const Scale* scales;
  int outputs, inputs, group_size;
};

// Positions of an expert's visits, kept within the buffers whatever `offset` holds.
__device__ __forceinline__ int2 visits_of(const int* offset, int expert, int visits) {
  const int begin = min(max(offset[expert], 0), visits);
  return make_int2(begin, min(max(offset[expert + 1], begin), visits));
}

__device__ __forceinline__ int num_tiles(int2 range) { return (range.y - range.x + kTokens - 1) / kTokens; }

// Tile number `index` when the experts' visits are cut into tiles, one expert after the other; `tokens` is 0 past the end.
__device__ __forceinline__ Tile find_tile(const int* offset, int experts, int visits, int index) {
  const int lane = threadIdx.x % 32, per_lane = (experts + 31) / 32;
  const int mine = lane * per_lane, end = min(mine + per_lane, experts);
  int tiles = 0;
  for (int e = mine; e < end; ++e) tiles += num_tiles(visits_of(offset, e, visits));
  int up_to = tiles;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(kWholeWarp, up_to, distance);
    if (lane >= distance) up_to += below;
  }
  Tile tile = {0, 0, 0};
  int left = index - (up_to - tiles);
  const bool found = left >= 0 && index < up_to;
  for (int e = mine; found && e < end; ++e) {
    const int2 range = visits_of(offset, e, visits);
    if (left >= 0 && left < num_tiles(range)) {
      const int first = range.x + left * kTokens;
      tile = {e, first, min(kTokens, range.y - first)};
    }
    left -= num_tiles(range);
  }
  const unsigned who = __ballot_sync(kWholeWarp, found);
  const int owner = who ? __ffs(who) - 1 : 0;
  return {__shfl_sync(kWholeWarp, tile.expert, owner), __shfl_sync(kWholeWarp, tile.first, owner),
          __shfl_sync(kWholeWarp, tile.tokens, owner)};
}

__device__ __forceinline__ u32 bits_of(__half2 pair) { return *reinterpret_cast<u32*>(&pair); }
__device__ __forceinline__ __half2 pair_of(u32 bits) { return *reinterpret_cast<__half2*>(&bits); }

// The left operand of a tile's j-th mma, from its stored words. Scales of e4m3 come later, with the sums.
__device__ __forceinline__ void fragment(u32 (&a)[4], const u32 (&word)[4 * kLoads], int j, __half2 lower, __half2 upper) {
#if WEIGHT_BITS == 4
  // An fp16 with the bits of 1024 and a code in the low bits is 1024 + code; in the bits above, 1024 + 16 * code.
  const u32 w = word[j], magic = 0x64006400u;
  const __half2 low_bias = pair_of(0x64086408u), high_bias = pair_of(0xd480d480u), sixteenth = pair_of(0x2c002c00u);
  const __half2 r0 = __hsub2(pair_of(and_or(w, 0x000f000fu, magic)), low_bias);
  const __half2 r1 = __hfma2(pair_of(and_or(w, 0x00f000f0u, magic)), sixteenth, high_bias);
  const __half2 r2 = __hsub2(pair_of(and_or(w >> 8, 0x000f000fu, magic)), low_bias);
  const __half2 r3 = __hfma2(pair_of(and_or(w >> 8, 0x00f000f0u, magic)), sixteenth, high_bias);
  a[0] = bits_of(__hmul2(r0, lower));
  a[1] = bits_of(__hmul2(r1, upper));
  a[2] = bits_of(__hmul2(r2, lower));
  a[3] = bits_of(__hmul2(r3, upper));
#elif WEIGHT_BITS == 8
  // e4m3's exponent and mantissa, seven bits further up, are an fp16 that is 2^8 too small: exact, subnormals included.
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const u32 odd = word[2 * j + p], even = odd << 8;
    a[2 * p] = and_or(even, 0x80008000u, even >> 1 & 0x3f803f80u);
    a[2 * p + 1] = and_or(odd, 0x80008000u, odd >> 1 & 0x3f803f80u);
  }
#else
#pragma unroll
  for (int r = 0; r < 4; ++r) a[r] = word[4 * j + r];
#endif
}

// Weights of one step, for every tile of a warp.
struct Weights {
  u32 word[kRowTiles][4 * kLoads];
  __half2 scale[kRowTiles];
};

// `row_of(slot)` is the row that the tile's token `slot` comes in as, or negative where there is none.
// `store(output_tile, g, slot, lower, upper)` takes the sums for outputs 16 * tile + g and + g + 8, on the lane that has
// them; for present slots and existing tiles only. All of a block's threads must come here.
template <typename RowOf, typename Store>
__device__ __forceinline__ void grouped_product(const Operands& in, const Tile& tile, RowOf row_of, Store store) {
  __shared__ __align__(16) uint4 ring[kSplit][kStages][kTokens][kChunks];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int split = warp / kRowWarps, in_group = threadIdx.x % kGroup;
  const int num_row_tiles = in.outputs / 16, total_steps = in.inputs / kStep;
  const int steps = (total_steps - split + kSplit - 1) / kSplit;  // this warp's: split, split + kSplit, ...
  const int wanted_tile = (blockIdx.y * kRowWarps + warp % kRowWarps) * kRowTiles;
  // Past the last tile: read the last ones again, store nothing.
  const int first_tile = min(wanted_tile, num_row_tiles - kRowTiles);

  // 32 bits are enough to count 16-byte chunks (launch.py refuses more), and registers are short.
  constexpr u32 kNothing = 0xffffffffu;
  const uint4* chunks = reinterpret_cast<const uint4*>(in.rows);
  const int chunk = in_group % kChunks;
  u32 source[kCopies];
#pragma unroll
  for (int c = 0; c < kCopies; ++c) {
    const int slot = in_group / kChunks + c * (kGroup / kChunks);
    const int row = slot < tile.tokens ? row_of(slot) : -1;
    source[c] = row < 0 ? kNothing : (u32)row * (u32)(in.inputs / 8) + chunk;
  }
  auto copy_tokens = [&](int i) {
    if (i < steps) {
#pragma unroll
      for (int c = 0; c < kCopies; ++c) {
        const int slot = in_group / kChunks + c * (kGroup / kChunks);
        // Chunks of odd rows are swapped in pairs: so the 8 lanes that read 16 bytes at a time touch every bank once.
        uint4* place = &ring[split][i % kStages][slot][chunk ^ (slot & 1)];
        const bool present = source[c] != kNothing;
        copy_async(place, chunks + (present ? source[c] + (split + i * kSplit) * kChunks : 0), present);
      }
    }
    copy_commit();
  };

  const size_t row_tile = (size_t)tile.expert * num_row_tiles + first_tile;
  const uint4* codes = in.codes + row_tile * total_steps * (kLoads * 32) + lane;
#if WEIGHT_BITS == 4
  const int group_shift = __ffs(in.group_size) - 1, groups = in.inputs >> group_shift;
#else
  const int groups = 1;
#endif
  [[maybe_unused]] const Scale* scales = in.scales + row_tile * groups * 8 + g;
  auto load_weights = [&](Weights& weights, int i) {
    if (i >= steps) return;
    const int step = split + i * kSplit;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        const uint4 v = load_streaming(codes + ((u32)(r * total_steps + step) * kLoads + load) * 32);
        weights.word[r][4 * load] = v.x;
        weights.word[r][4 * load + 1] = v.y;
        weights.word[r][4 * load + 2] = v.z;
        weights.word[r][4 * load + 3] = v.w;
      }
#if WEIGHT_BITS == 4
      weights.scale[r] = scales[(r * groups + ((step * kStep + 16 * t) >> group_shift)) * 8];
#endif
    }
  };

  float sum[kRowTiles][kColumns][4] = {};
  auto multiply = [&](const Weights& weights, int i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u32 a[kRowTiles][2][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          fragment(a[r][j], weights.word[r], 2 * half + j, __low2half2(weights.scale[r]), __high2half2(weights.scale[r]));
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const uint4 b = ring[split][i % kStages][n * 8 + g][(2 * t + half) ^ (g & 1)];
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          mma_16x8x16(sum[r][n], a[r][0], b.x, b.y);
          mma_16x8x16(sum[r][n], a[r][1], b.z, b.w);
        }
      }
    }
  };

  Weights weights[kAhead];
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead) load_weights(weights[ahead], ahead);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy_tokens(i);
  for (int first = 0; first < steps; first += kAhead) {
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int i = first + ahead;
      if (i < steps) {
        copy_wait<kStages - 2>();
        if (kRowWarps == 1) __syncwarp();
        else __syncthreads();
        copy_tokens(i + kStages - 1);
        multiply(weights[ahead], i);
        load_weights(weights[ahead], i + kAhead);
      }
    }
  }

  // Sum over the splits, in order; then warp `split` of a row of warps stores every kSplit-th of their results.
  float4* partial = reinterpret_cast<float4*>(ring);
  constexpr int kResults = kRowTiles * kColumns;
  static_assert(kSplit == 1 || kWarps * kResults * 32 * sizeof(float4) <= sizeof(ring), "partial sums fit the ring");
  auto place = [&](int part, int result) {
    return ((part * kRowWarps + warp % kRowWarps) * kResults + result) * 32 + lane;
  };
  if (kSplit > 1) {
    copy_wait<0>();
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
        partial[place(split, r * kColumns + n)] = make_float4(sum[r][n][0], sum[r][n][1], sum[r][n][2], sum[r][n][3]);
    __syncthreads();
  }
  if (first_tile != wanted_tile) return;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    float lower_scale = 1.0f, upper_scale = 1.0f;
#if WEIGHT_BITS == 8
    lower_scale = scales[r * 8].x * 256.0f;
    upper_scale = scales[r * 8].y * 256.0f;
#endif
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int result = r * kColumns + n;
      float4 c = make_float4(sum[r][n][0], sum[r][n][1], sum[r][n][2], sum[r][n][3]);
      if (kSplit > 1) {
        if (result % kSplit != split) continue;
        c = partial[place(0, result)];
#pragma unroll
        for (int part = 1; part < kSplit; ++part) {
          const float4 more = partial[place(part, result)];
          c = make_float4(c.x + more.x, c.y + more.y, c.z + more.z, c.w + more.w);
        }
      }
      const int slot = n * 8 + 2 * t;
      if (slot < tile.tokens) store(first_tile + r, g, slot, c.x * lower_scale, c.z * upper_scale);
      if (slot + 1 < tile.tokens) store(first_tile + r, g, slot + 1, c.y * lower_scale, c.w * upper_scale);
    }
  }
}

#endif
