#include "feed_forward.h"

#include <algorithm>

#include "activations.h"

namespace corral {
namespace {

// The panels of one expert's visits.
struct ExpertPanels {
  int64_t expert;
  size_t first, end;
};

void cut_by_expert(const std::vector<Visit>& visits, std::vector<PanelPlace>& places, std::vector<ExpertPanels>& experts) {
  const int64_t count = int64_t(visits.size());
  for (int64_t begin = 0, end; begin < count; begin = end) {
    for (end = begin + 1; end < count && visits[end].expert == visits[begin].expert;) end++;
    const size_t first = places.size();
    cut_into_panels(begin, end - begin, places);
    experts.push_back({visits[begin].expert, first, places.size()});
  }
}

}  // namespace

FeedForward read_feed_forward(const ort::Api& api, const ort::KernelInfo* info, size_t first, size_t rank) {
  const FeedForward weights{
      read_weights(api, info, {first, first + 1, first + 4}, rank, "gate_up_bits", "gate_up"),
      read_weights(api, info, {first + 2, first + 3, first + 5}, rank, "down_bits", "down")};
  const Weights &gate_up = weights.gate_up, &down = weights.down;
  if (gate_up.tiles % 2 || down.inputs.count != weights.width() || down.outputs() != weights.hidden() ||
      gate_up.experts != down.experts) {
    throw ort::Failure(ort::kInvalidArgument,
                       "gate_up has " + std::to_string(gate_up.experts) + " experts of " +
                           std::to_string(gate_up.inputs.count) + " inputs and " + std::to_string(gate_up.outputs()) +
                           " outputs, down " + std::to_string(down.experts) + " of " + std::to_string(down.inputs.count) +
                           " and " + std::to_string(down.outputs()) +
                           "; expected down to take half of gate_up's outputs and to give as many as gate_up takes");
  }
  return weights;
}

void feed_forward(const Kernels& kernels, const ort::Workers& workers, const FeedForward& weights, const float* x,
                  const std::vector<Visit>& visits, float* answers) {
  const Weights &gate_up = weights.gate_up, &down = weights.down;
  const Products &into = products_of(kernels, gate_up.bits), &back = products_of(kernels, down.bits);
  const int64_t rows = int64_t(visits.size()), hidden = weights.hidden(), width = weights.width();
  std::vector<PanelPlace> places;
  std::vector<ExpertPanels> experts;
  cut_by_expert(visits, places, experts);

  Activations tokens(rows, gate_up.inputs);
  tokens.fill(
      kernels, workers, places, [&](int64_t row) { return x + visits[row].token * hidden; },
      [&](int64_t row) { return visits[row].gain; }, "x");

  Buffer<float> h(rows * width);
  const int64_t pairs = gate_up.tiles / 2, pairs_per_task = rows == 1 ? 8 : 2;
  const int64_t gate_up_tasks = (pairs + pairs_per_task - 1) / pairs_per_task;
  workers.each(gate_up_tasks * experts.size(), [&](size_t task) {
    const ExpertPanels& mine = experts[task / gate_up_tasks];
    const int64_t begin = int64_t(task) % gate_up_tasks * pairs_per_task, end = std::min(begin + pairs_per_task, pairs);
    alignas(64) float both[kPanelRows * 2 * kTileOutputs];
    for (size_t p = mine.first; p < mine.end; p++) {
      const Panel panel = tokens.panel(places[p]);
      for (int64_t t = begin; t < end; t++) {
        into.two_tiles(gate_up.tile(mine.expert, t), gate_up.tile(mine.expert, pairs + t), panel, gate_up.inputs, both,
                       2 * kTileOutputs);
        kernels.swiglu(both, panel.rows, h.get() + places[p].first * width + t * kTileOutputs, width);
      }
    }
  });

  Activations activated(rows, down.inputs);
  activated.fill(
      kernels, workers, places, [&](int64_t row) { return h.get() + row * width; }, [](int64_t) { return 1.0f; },
      "what gate and up made of x");

  const int64_t tiles_per_task = rows == 1 ? 8 : 4, down_tasks = (down.tiles + tiles_per_task - 1) / tiles_per_task;
  workers.each(down_tasks * experts.size(), [&](size_t task) {
    const ExpertPanels& mine = experts[task / down_tasks];
    const int64_t begin = int64_t(task) % down_tasks * tiles_per_task, end = std::min(begin + tiles_per_task, down.tiles);
    alignas(64) float both[kPanelRows * 2 * kTileOutputs];
    for (size_t p = mine.first; p < mine.end; p++) {
      const Panel panel = activated.panel(places[p]);
      for (int64_t t = begin; t < end; t += 2) {
        const bool two = t + 2 <= end;
        if (two) {
          back.two_tiles(down.tile(mine.expert, t), down.tile(mine.expert, t + 1), panel, down.inputs, both,
                         2 * kTileOutputs);
        } else {
          back.one_tile(down.tile(mine.expert, t), panel, down.inputs, both, 2 * kTileOutputs);
        }
        for (int64_t row = 0; row < panel.rows; row++) {
          const float* from = both + row * 2 * kTileOutputs;
          std::copy(from, from + (two ? 2 : 1) * kTileOutputs,
                    answers + visits[places[p].first + row].answer * hidden + t * kTileOutputs);
        }
      }
    }
  });
}

}  // namespace corral
