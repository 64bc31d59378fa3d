#include "route.h"

#include <algorithm>
#include <cmath>

namespace corral {

std::vector<Visit> route(const float* logits, int64_t tokens, int64_t experts, int64_t k) {
  std::vector<Visit> visits;
  visits.reserve(tokens * k);
  std::vector<int64_t> order(experts);
  for (int64_t token = 0; token < tokens; token++, logits += experts) {
    for (int64_t e = 0; e < experts; e++) {
      if (std::isnan(logits[e])) {
        throw ort::Failure(ort::kInvalidArgument,
                           "a router logit is not a number: weights or caches are damaged, or the model overflows");
      }
      order[e] = e;
    }
    std::partial_sort(order.begin(), order.begin() + k, order.end(), [logits](int64_t a, int64_t b) {
      return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
    });
    for (int64_t i = 0; i < k; i++) {
      const double gain = 1.0 / (1.0 + std::exp(-double(logits[order[i]])));
      visits.push_back({token, order[i], token * k + i, float(gain)});
    }
  }
  std::stable_sort(visits.begin(), visits.end(), [](const Visit& a, const Visit& b) { return a.expert < b.expert; });
  return visits;
}

}  // namespace corral
