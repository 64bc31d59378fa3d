// Gate and up: the first half of every expert, with its SwiGLU.
//
//     h[p] = silu(g * (W_gate x)) * (g * (W_up x)),  x = tokens[visit[p] / top_k],  g = gate[p]
//
// for every position p of the sorted visits. Llama 4 scales an expert's *input* by the gate; a product is linear, so
// the gate multiplies the fp32 sums instead, and tokens are read as they are. `codes` holds [2 * width, hidden] an
// expert, 8 gate outputs and the 8 up outputs of the same units in turn, so that one lane has both of a unit.
// Layouts: grouped_product.cuh. In: x [tokens, hidden] fp16 and moe_route's tables; out: h [visits, width] fp16.
// Grid: (tiles of visits, outputs / (16 * tiles a block)).
#include "grouped_product.cuh"

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    moe_gate_up(const __half* __restrict__ x, const int* __restrict__ visit, const float* __restrict__ gate,
                const int* __restrict__ offset, const uint4* __restrict__ codes,
#if WEIGHT_BITS < 16
                const Scale* __restrict__ scales,
#endif
                int tokens, int hidden, int width, int experts, int top_k, int group_size, __half* __restrict__ h) {
#if WEIGHT_BITS == 16
  const Scale* scales = nullptr;
#endif
  const int visits = tokens * top_k;
  const Tile tile = find_tile(offset, experts, visits, blockIdx.x);
  if (tile.tokens == 0) return;
  grouped_product(
      Operands{x, codes, scales, 2 * width, hidden, group_size}, tile,
      [&](int slot) {
        const int v = visit[tile.first + slot];
        return (u32)v < (u32)visits ? v / top_k : -1;
      },
      [&](int output_tile, int g, int slot, float gate_sum, float up_sum) {
        const int position = tile.first + slot;
        const float scale = gate[position], gated = scale * gate_sum;
        const float silu = __fdividef(gated, 1.0f + __expf(-gated));
        h[(size_t)position * width + output_tile * 8 + g] = __float2half_rn(silu * (scale * up_sum));
      });
}
