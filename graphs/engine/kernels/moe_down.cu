// Down: the second half of every expert, and the way back from sorted visits to tokens.
//
//     y[visit[p]] = W_down h[p]
//
// With one expert a token, y [visits, hidden] is the result; with more, its sum over each token's visits is. Every visit
// is written exactly once, so nothing is added up here and nothing needs clearing before.
// Layouts: grouped_product.cuh. In: h [visits, width] fp16 and moe_route's tables; out: y [visits, hidden] fp16.
// Grid: (tiles of visits, outputs / (16 * tiles a block)).
#include "grouped_product.cuh"

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    moe_down(const __half* __restrict__ h, const int* __restrict__ visit, const int* __restrict__ offset,
             const uint4* __restrict__ codes,
#if WEIGHT_BITS < 16
             const Scale* __restrict__ scales,
#endif
             int tokens, int hidden, int width, int experts, int top_k, int group_size, __half* __restrict__ y) {
#if WEIGHT_BITS == 16
  const Scale* scales = nullptr;
#endif
  const int visits = tokens * top_k;
  const Tile tile = find_tile(offset, experts, visits, blockIdx.x);
  if (tile.tokens == 0) return;
  grouped_product(
      Operands{h, codes, scales, hidden, width, group_size}, tile, [&](int slot) { return tile.first + slot; },
      [&](int output_tile, int g, int slot, float lower, float upper) {
        const int v = visit[tile.first + slot];
        if ((u32)v >= (u32)visits) return;
        __half* row = y + (size_t)v * hidden + output_tile * 16 + g;
        row[0] = __float2half_rn(lower);
        row[8] = __float2half_rn(upper);
      });
}
