// Top-k routing as the model defines it (corral::MoE): the k largest logits, ties to the lower expert; an expert sees its
// input scaled by the sigmoid of its logit.
#pragma once

#include <vector>

#include "feed_forward.h"

namespace corral {

// The visits of `tokens` rows of logits [tokens, experts], sorted by expert; token t's i-th choice answers to row
// t * k + i. Throws ort::Failure where a logit is not a number.
std::vector<Visit> route(const float* logits, int64_t tokens, int64_t experts, int64_t k);

}  // namespace corral
