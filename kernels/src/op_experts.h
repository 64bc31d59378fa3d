// TiledExperts(x [..., H], router_logits [..., E], gate_up, its scales, down, its scales, gate_up's zero points?, down's?;
//              k, gate_up_bits, down_bits) -> y [..., H]
//
// The routed experts as corral::MoE defines them: the sum over a token's k largest logits of expert(sigmoid(logit) x).
// Weights as in TiledFeedForward, with a leading axis of E experts.
//
// TiledMoE(x, router_logits, the same four, shared_gate_up, its scales, shared_down, its scales, all four's zero points?; …,
//          shared_gate_up_bits, shared_down_bits) adds to it what the shared expert makes of x, at once: with few tokens
// threads wait for each other longer than they compute.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <memory>
#include <optional>

#include "buffer.h"
#include "dispatch.h"
#include "feed_forward.h"
#include "operator.h"
#include "read_ahead.h"
#include "route.h"
#include "tokens.h"

namespace corral {

class Experts {
 public:
  static constexpr Port kOutputs[] = {ort::kFloat};

  Experts(const ort::Api& api, const ort::KernelInfo* info, const FeedForward& weights, std::optional<FeedForward> shared)
      : kernels_(*choose_instruction_set().kernels),
        weights_(weights),
        shared_(shared),
        k_(api.attribute(info, "k")),
        visited_(new std::atomic<int64_t>[weights.gate_up.experts]) {
    for (int64_t expert = 0; expert < experts(); expert++) visited_[expert] = std::numeric_limits<int32_t>::min();
    if (shared_ && shared_->hidden() != weights_.hidden()) {
      throw ort::Failure(ort::kInvalidArgument, "the shared expert takes " + std::to_string(shared_->hidden()) +
                                                    " inputs, the others " + std::to_string(weights_.hidden()));
    }
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
    const int64_t hidden = weights_.hidden();
    if (!shared_ && k_ == 1) return feed_forward(kernels_, workers, x, {{weights_, visits, y}});
    Buffer<float> answers(tokens * k_ * hidden);
    if (shared_) {
      feed_forward(kernels_, workers, x, {{weights_, visits, answers.get()}, {*shared_, visits_of_all(tokens), y}});
    } else {
      feed_forward(kernels_, workers, x, {{weights_, visits, answers.get()}});
    }
    workers.each_worth(tokens, tokens * k_ * hidden, [&](size_t token) {
      // Always in the order of the choices, whoever else is in the batch.
      const float* first = answers.get() + int64_t(token) * k_ * hidden;
      float* sum = y + int64_t(token) * hidden;
      for (int64_t choice = 0; choice < k_; choice++) {
        if (choice || shared_) {
          kernels_.add(sum, first + choice * hidden, hidden, sum);
        } else {
          std::copy_n(first, hidden, sum);
        }
      }
    });
  }

  // An expert that was visited less than two seconds ago is taken to be in memory still: to ask takes microseconds.
  void read_ahead_chosen(const std::vector<Visit>& visits) const {
    const int64_t now = seconds();
    for (const Visit& visit : visits) {
      if (now - visited_[visit.expert].exchange(now, std::memory_order_relaxed) <= 1) continue;
      read_ahead(weights_.gate_up, visit.expert);
      read_ahead(weights_.down, visit.expert);
    }
  }

  static int64_t seconds() {
    using std::chrono::steady_clock;
    return std::chrono::duration_cast<std::chrono::seconds>(steady_clock::now().time_since_epoch()).count();
  }

  const Kernels& kernels_;
  FeedForward weights_;
  std::optional<FeedForward> shared_;
  int64_t k_;
  std::unique_ptr<std::atomic<int64_t>[]> visited_;  // when, of each expert
};

class TiledExperts : public Experts {
 public:
  static constexpr const char* kName = "TiledExperts";
  static constexpr Port kInputs[] = {ort::kFloat, ort::kFloat,   ort::kUint8,         ort::kFloat16,
                                     ort::kUint8, ort::kFloat16, {ort::kUint8, true}, {ort::kUint8, true}};

  TiledExperts(const ort::Api& api, const ort::KernelInfo* info)
      : Experts(api, info, read_feed_forward(api, info, {2, 6}, 3), std::nullopt) {}
};

class TiledMoE : public Experts {
 public:
  static constexpr const char* kName = "TiledMoE";
  static constexpr Port kInputs[] = {ort::kFloat,         ort::kFloat,         ort::kUint8,         ort::kFloat16,
                                     ort::kUint8,         ort::kFloat16,       ort::kUint8,         ort::kFloat16,
                                     ort::kUint8,         ort::kFloat16,       {ort::kUint8, true}, {ort::kUint8, true},
                                     {ort::kUint8, true}, {ort::kUint8, true}};

  TiledMoE(const ort::Api& api, const ort::KernelInfo* info)
      : Experts(api, info, read_feed_forward(api, info, {2, 10}, 3), read_feed_forward(api, info, {6, 12}, 2, "shared_")) {}
};

}  // namespace corral
