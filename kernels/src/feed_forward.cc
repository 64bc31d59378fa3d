#include "feed_forward.h"

#include <algorithm>
#include <deque>

#include "activations.h"

namespace corral {
namespace {

// The panels of one expert's visits.
struct ExpertPanels {
  int64_t expert;
  size_t first, end;
};

// One call, in three steps. The tasks of a step are independent of each other.
class Passage {
 public:
  Passage(const Kernels& kernels, const float* x, const FeedForwardCall& call)
      : kernels_(kernels),
        into_(products_of(kernels, call.weights.gate_up.bits)),
        back_(products_of(kernels, call.weights.down.bits)),
        x_(x),
        call_(call),
        tokens_(rows(), gate_up().inputs),
        activated_(rows(), down().inputs) {
    const int64_t count = rows();
    for (int64_t begin = 0, end; begin < count; begin = end) {
      const int64_t expert = call.visits[begin].expert;
      for (end = begin + 1; end < count && call.visits[end].expert == expert;) end++;
      const size_t first = places_.size();
      cut_into_panels(begin, end - begin, places_);
      experts_.push_back({expert, first, places_.size()});
    }
  }

  size_t panels() const { return places_.size(); }
  size_t gate_up_tasks() const { return experts_.size() * tasks_an_expert(pairs(), pairs_a_task()); }
  size_t down_tasks() const { return experts_.size() * tasks_an_expert(down().tiles, tiles_a_task()); }

  void quantize_tokens(size_t panel) {
    tokens_.quantize(
        kernels_, places_[panel], [&](int64_t row) { return x_ + call_.visits[row].token * hidden(); },
        [&](int64_t row) { return call_.visits[row].gain; });
  }

  // Some groups of the activated values, for all rows of an expert.
  void gate_up_task(size_t task) {
    const int64_t tasks = tasks_an_expert(pairs(), pairs_a_task()), begin = int64_t(task) % tasks * pairs_a_task();
    const int64_t end = std::min(begin + pairs_a_task(), pairs()), group = down().inputs.group;
    const ExpertPanels& mine = experts_[task / tasks];
    alignas(64) float both[kPanelRows * 2 * kTileOutputs], h[kPanelRows * kLargestGroup];
    for (size_t p = mine.first; p < mine.end; p++) {
      const Panel panel = tokens_.panel(places_[p]);
      for (int64_t t = begin; t < end; t++) {
        const int64_t column = t * kTileOutputs % group;
        into_.two_tiles(gate_up().tile(mine.expert, t), gate_up().tile(mine.expert, pairs() + t), panel, gate_up().inputs,
                        both, 2 * kTileOutputs);
        kernels_.swiglu(both, panel.rows, h + column, group);
        if (column + kTileOutputs == group) activated_.quantize_group(kernels_, places_[p], t * kTileOutputs / group, h);
      }
    }
  }

  void down_task(size_t task) {
    const int64_t tasks = tasks_an_expert(down().tiles, tiles_a_task()), begin = int64_t(task) % tasks * tiles_a_task();
    const int64_t end = std::min(begin + tiles_a_task(), down().tiles);
    const ExpertPanels& mine = experts_[task / tasks];
    alignas(64) float both[kPanelRows * 2 * kTileOutputs];
    for (size_t p = mine.first; p < mine.end; p++) {
      const Panel panel = activated_.panel(places_[p]);
      for (int64_t t = begin; t < end; t += 2) {
        const Tile tile = down().tile(mine.expert, t);
        const bool two = t + 2 <= end;
        if (two) {
          back_.two_tiles(tile, down().tile(mine.expert, t + 1), panel, down().inputs, both, 2 * kTileOutputs);
        } else {
          back_.one_tile(tile, panel, down().inputs, both, 2 * kTileOutputs);
        }
        for (int64_t row = 0; row < panel.rows; row++) {
          const float* from = both + row * 2 * kTileOutputs;
          std::copy(from, from + (two ? 2 : 1) * kTileOutputs,
                    call_.answers + call_.visits[places_[p].first + row].answer * hidden() + t * kTileOutputs);
        }
      }
    }
  }

  void check_tokens() const { tokens_.check("x"); }
  void check_activated() const { activated_.check("what gate and up made of x"); }

 private:
  static int64_t tasks_an_expert(int64_t count, int64_t at_once) { return (count + at_once - 1) / at_once; }

  const Weights& gate_up() const { return call_.weights.gate_up; }
  const Weights& down() const { return call_.weights.down; }
  int64_t rows() const { return int64_t(call_.visits.size()); }
  int64_t hidden() const { return call_.weights.hidden(); }
  int64_t width() const { return call_.weights.width(); }
  int64_t pairs() const { return gate_up().tiles / 2; }
  int64_t pairs_a_task() const { return kLargestGroup / kTileOutputs; }  // a whole number of groups
  int64_t tiles_a_task() const { return rows() == 1 ? 8 : 4; }

  const Kernels& kernels_;
  const Products &into_, &back_;
  const float* x_;
  const FeedForwardCall& call_;
  std::vector<PanelPlace> places_;
  std::vector<ExpertPanels> experts_;
  Activations tokens_;
  Activations activated_;
};

using Passages = std::deque<Passage>;  // which never moves its elements

// One step of all passages, of so many operations.
void step(const ort::Workers& workers, Passages& passages, int64_t operations, size_t (Passage::*tasks)() const,
          void (Passage::*work)(size_t)) {
  size_t count = 0;
  for (const Passage& passage : passages) count += (passage.*tasks)();
  workers.each_worth(count, operations, [&](size_t task) {
    for (Passage& passage : passages) {
      const size_t own = (passage.*tasks)();
      if (task < own) return (passage.*work)(task);
      task -= own;
    }
  });
}

}  // namespace

FeedForward read_feed_forward(const ort::Api& api, const ort::KernelInfo* info, FeedForwardInputs at, size_t rank,
                              const std::string& prefix) {
  const auto read = [&](WeightInputs matrix, const std::string& name) {
    return read_weights(api, info, matrix, rank, (name + "_bits").c_str(), name.c_str());
  };
  const FeedForward weights{read({at.weights, at.weights + 1, at.zeros}, prefix + "gate_up"),
                            read({at.weights + 2, at.weights + 3, at.zeros + 1}, prefix + "down")};
  const Weights &gate_up = weights.gate_up, &down = weights.down;
  if (gate_up.tiles % 2 || down.inputs.count != weights.width() || down.outputs() != weights.hidden() ||
      gate_up.experts != down.experts) {
    throw ort::Failure(ort::kInvalidArgument,
                       prefix + "gate_up has " + std::to_string(gate_up.experts) + " experts of " +
                           std::to_string(gate_up.inputs.count) + " inputs and " + std::to_string(gate_up.outputs()) +
                           " outputs, down " + std::to_string(down.experts) + " of " + std::to_string(down.inputs.count) +
                           " and " + std::to_string(down.outputs()) +
                           "; expected down to take half of gate_up's outputs and to give as many as gate_up takes");
  }
  return weights;
}

std::vector<Visit> visits_of_all(int64_t tokens) {
  std::vector<Visit> visits(tokens);
  for (int64_t token = 0; token < tokens; token++) visits[token] = {token, 0, token, 1.0f};
  return visits;
}

void feed_forward(const Kernels& kernels, const ort::Workers& workers, const float* x,
                  std::initializer_list<FeedForwardCall> calls) {
  Passages passages;
  for (const FeedForwardCall& call : calls) passages.emplace_back(kernels, x, call);
  int64_t into = 0, between = 0, products = 0;
  for (const FeedForwardCall& call : calls) {
    const int64_t rows = int64_t(call.visits.size()), hidden = call.weights.hidden(), width = call.weights.width();
    into += rows * hidden;
    between += rows * width;
    products += rows * hidden * width;
  }
  step(workers, passages, kQuantizing * into, &Passage::panels, &Passage::quantize_tokens);
  for (const Passage& passage : passages) passage.check_tokens();
  step(workers, passages, 2 * products / kProductsAtOnce + kQuantizing * between, &Passage::gate_up_tasks,
       &Passage::gate_up_task);
  for (const Passage& passage : passages) passage.check_activated();
  step(workers, passages, products / kProductsAtOnce, &Passage::down_tasks, &Passage::down_task);
}

}  // namespace corral
