// SwiGLU feed-forward, (silu(x gate) * (x up)) down, of the experts that tokens visit. A dense one is one expert that
// every token visits.
#pragma once

#include <initializer_list>
#include <string>
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

// From where on inputs of an operator are codes and scales of both, and their zero points, which are optional.
struct FeedForwardInputs {
  size_t weights, zeros;
};

// `prefix` is that of the names in attributes and messages. Throws ort::Failure where the two matrices do not fit each other.
FeedForward read_feed_forward(const ort::Api& api, const ort::KernelInfo* info, FeedForwardInputs at, size_t rank,
                              const std::string& prefix = "");

// What the visits of one set of experts, sorted by expert, come to: a row of `answers` [answers, hidden] for each.
struct FeedForwardCall {
  const FeedForward& weights;
  const std::vector<Visit>& visits;
  float* answers;
};

// All of x [tokens, hidden]; those of several calls at once, so that threads wait for each other as often as in one.
void feed_forward(const Kernels& kernels, const ort::Workers& workers, const float* x,
                  std::initializer_list<FeedForwardCall> calls);

// Every one of so many tokens at the only expert.
std::vector<Visit> visits_of_all(int64_t tokens);

// Tokens that are computed together: more would only need more scratch memory.
constexpr int64_t kTokensAtOnce = 2048;

}  // namespace corral
