// TiledExperts(x [..., H], router_logits [..., E], gate_up, its scales, down, its scales, gate_up's zero points?, down's?;
//              k, gate_up_bits, down_bits) -> y [..., H]
//
// The routed experts as corral::MoE defines them: the sum over a token's k largest logits of expert(sigmoid(logit) x).
// Weights as in TiledFeedForward, with a leading axis of E experts.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "dispatch.h"
#include "feed_forward.h"
#include "operator.h"
#include "read_ahead.h"
#include "route.h"
#include "tokens.h"

namespace corral {

class TiledExperts {
 public:
  static constexpr const char* kName = "TiledExperts";
  static constexpr Port kInputs[] = {ort::kFloat, ort::kFloat,   ort::kUint8,         ort::kFloat16,
                                     ort::kUint8, ort::kFloat16, {ort::kUint8, true}, {ort::kUint8, true}};
  static constexpr Port kOutputs[] = {ort::kFloat};

  TiledExperts(const ort::Api& api, const ort::KernelInfo* info)
      : kernels_(*choose_instruction_set().kernels),
        weights_(read_feed_forward(api, info, 2, 3)),
        k_(api.attribute(info, "k")) {
    if (k_ < 1 || k_ > experts()) {
      throw ort::Failure(ort::kInvalidArgument, "k is " + std::to_string(k_) + ", expected 1 to the number of experts, " +
                                                    std::to_string(experts()));
    }
  }

  void compute(const ort::Api& api, ort::KernelContext* context) const {
    const int64_t hidden = weights_.hidden();
    const Tokens x = read_tokens(api, context, 0, hidden, "x");
    const Tokens logits = read_tokens(api, context, 1, experts(), "router_logits");
    if (logits.count != x.count) {
      throw ort::Failure(ort::kInvalidArgument, "router_logits has shape " + shape_in_words(logits.shape) +
                                                    ", expected a row for each of the " + std::to_string(x.count) +
                                                    " rows of x");
    }
    float* y = api.output(context, x.shape);
    for (int64_t first = 0; first < x.count; first += kTokensAtOnce) {
      const int64_t tokens = std::min(kTokensAtOnce, x.count - first);
      some(ort::Workers(api, context), x.values + first * hidden, logits.values + first * experts(), tokens,
           y + first * hidden);
    }
  }

 private:
  int64_t experts() const { return weights_.gate_up.experts; }

  void some(const ort::Workers& workers, const float* x, const float* logits, int64_t tokens, float* y) const {
    const std::vector<Visit> visits = route(logits, tokens, experts(), k_);
    read_ahead_chosen(visits);
    if (k_ == 1) return feed_forward(kernels_, workers, weights_, x, visits, y);
    const int64_t hidden = weights_.hidden();
    Buffer<float> answers(tokens * k_ * hidden);
    feed_forward(kernels_, workers, weights_, x, visits, answers.get());
    for (int64_t token = 0; token < tokens; token++) {
      for (int64_t i = 0; i < hidden; i++) {
        float sum = 0;  // always in the order of the choices, whoever else is in the batch
        for (int64_t choice = 0; choice < k_; choice++) sum += answers[(token * k_ + choice) * hidden + i];
        y[token * hidden + i] = sum;
      }
    }
  }

  void read_ahead_chosen(const std::vector<Visit>& visits) const {
    int64_t last = -1;
    for (const Visit& visit : visits) {
      if (visit.expert == last) continue;
      last = visit.expert;
      read_ahead(weights_.gate_up, last);
      read_ahead(weights_.down, last);
    }
  }

  const Kernels& kernels_;
  FeedForward weights_;
  int64_t k_;
};

}  // namespace corral
