// SwiGLU feed-forward, (silu(x gate) * (x up)) down, of the experts that tokens visit. A dense one is one expert that
// every token visits.
#pragma once

#include <vector>

#include "kernels.h"
#include "ort_api.h"
#include "weights.h"

namespace corral {

// One token at one expert. The expert sees gain * x; its answer goes to row `answer` of the answers.
struct Visit {
  int64_t token, expert, answer;
  float gain;
};

// The tiles of `gate_up` are first all of the gate, then all of the up half.
struct FeedForward {
  Weights gate_up, down;

  int64_t hidden() const { return gate_up.inputs.count; }
  int64_t width() const { return gate_up.outputs() / 2; }
};

// Inputs `first` to `first + 3` are codes and scales of both; zero points may follow. Throws ort::Failure where the two
// matrices do not fit each other.
FeedForward read_feed_forward(const ort::Api& api, const ort::KernelInfo* info, size_t first, size_t rank);

// `visits` are sorted by expert. x [tokens, hidden], answers [answers, hidden].
void feed_forward(const Kernels& kernels, const ort::Workers& workers, const FeedForward& weights, const float* x,
                  const std::vector<Visit>& visits, float* answers);

// Tokens that are computed together: more would only need more scratch memory.
constexpr int64_t kTokensAtOnce = 2048;

}  // namespace corral
