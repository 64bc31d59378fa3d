// Route: which experts each token visits, and the visits put in order of the expert visited.
//
// A visit v = token * top_k + choice. In: router logits [tokens, experts] fp32: rounded
// to fp16, two may be equal that were not, and another expert run. Out:
//   expert [visits]      which expert visit v goes to
//   visit  [visits]      visits sorted by expert; visits of one expert keep their order
//   gate   [visits]      sigmoid(logit), in that sorted order
//   offset [experts + 1] where each expert's visits begin in it; the last is the number of visits
//
// One block. Equal logits go to the lower expert number, as ONNX's TopK has it. NaN counts as largest, so that it reaches
// the output instead of getting lost. Nothing here depends on the order in which threads run: two runs give equal bytes.
#include "device.cuh"

constexpr int kRouteThreads = 1024;
constexpr int kRouteWarps = kRouteThreads / 32;
constexpr int kMaxExperts = 1024;

// The best expert after `previous` (of value `bound`) in the order: larger value first, then lower number.
__device__ int next_best(const float4* row, int experts, int previous, float& bound) {
  int best = -1;
  float best_value = 0.0f;
  for (int chunk = 0; chunk < experts / 4; ++chunk) {
    const float4 four = row[chunk];
    const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = logits[i] == logits[i] ? logits[i] : __int_as_float(0x7f800000);
      const int e = chunk * 4 + i;
      const bool eligible = previous < 0 || value < bound || (value == bound && e > previous);
      if (eligible && (best < 0 || value > best_value)) {
        best = e;
        best_value = value;
      }
    }
  }
  bound = best_value;
  return best;
}

extern "C" __global__ void __launch_bounds__(kRouteThreads)
    moe_route(const float* __restrict__ logits, int tokens, int experts, int top_k, int* __restrict__ expert,
              int* __restrict__ visit, float* __restrict__ gate, int* __restrict__ offset) {
  __shared__ int count[kMaxExperts];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int visits = tokens * top_k;

  for (int token = threadIdx.x; token < tokens; token += kRouteThreads) {
    const float4* row = reinterpret_cast<const float4*>(logits + (size_t)token * experts);
    int chosen = -1;
    float bound = 0.0f;
    for (int k = 0; k < top_k; ++k) {
      chosen = next_best(row, experts, chosen, bound);
      expert[token * top_k + k] = chosen;
    }
  }
  __syncthreads();

  // A warp for each expert goes through all visits in order: once to count its own, once to place them.
  for (int e = warp; e < experts; e += kRouteWarps) {
    int mine = 0;
    for (int first = 0; first < visits; first += 32) {
      const int v = first + lane;
      mine += __popc(__ballot_sync(kWholeWarp, v < visits && expert[v] == e));
    }
    if (lane == 0) count[e] = mine;
  }
  __syncthreads();

  for (int e = warp; e < experts; e += kRouteWarps) {
    int position = 0;
    for (int before = 0; before < e; ++before) position += count[before];
    if (lane == 0) {
      offset[e] = position;
      if (e == experts - 1) offset[experts] = visits;
    }
    for (int first = 0; first < visits; first += 32) {
      const int v = first + lane;
      const bool here = v < visits && expert[v] == e;
      const unsigned all = __ballot_sync(kWholeWarp, here);
      if (here) {
        const int p = position + __popc(all & ((1u << lane) - 1));
        const float logit = logits[(size_t)(v / top_k) * experts + e];
        visit[p] = v;
        gate[p] = __fdividef(1.0f, 1.0f + __expf(-logit));
      }
      position += __popc(all);
    }
  }
}
