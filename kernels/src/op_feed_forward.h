// TiledFeedForward(x [..., H], gate_up, its scales, down, its scales, gate_up's zero points?, down's?)
//   -> (silu(x gate) * (x up)) down, [..., H]
//
// gate_up holds I outputs of the gate, then I of up, in 2 I / 16 tiles; down has I inputs and H outputs.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "feed_forward.h"
#include "operator.h"
#include "tokens.h"

namespace corral {

class TiledFeedForward {
 public:
  static constexpr const char* kName = "TiledFeedForward";
  static constexpr Port kInputs[] = {ort::kFloat, ort::kUint8, ort::kFloat16, ort::kUint8, ort::kFloat16,
                                     {ort::kUint8, true}, {ort::kUint8, true}};
  static constexpr Port kOutputs[] = {ort::kFloat};

  TiledFeedForward(const ort::Api& api, const ort::KernelInfo* info)
      : kernels_(*choose_instruction_set().kernels), weights_(read_feed_forward(api, info, {1, 5}, 2)) {}

  void compute(const ort::Api& api, ort::KernelContext* context) const {
    const int64_t hidden = weights_.hidden();
    const Tokens x = read_tokens(api, context, 0, hidden, "x");
    float* y = api.output(context, x.shape);
    for (int64_t first = 0; first < x.count; first += kTokensAtOnce) {
      const std::vector<Visit> visits = visits_of_all(std::min(kTokensAtOnce, x.count - first));
      feed_forward(kernels_, ort::Workers(api, context), x.values + first * hidden, {{weights_, visits, y + first * hidden}});
    }
  }

 private:
  const Kernels& kernels_;
  FeedForward weights_;
};

}  // namespace corral
