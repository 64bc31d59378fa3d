#include "multiply.h"

#include <algorithm>

#include "activations.h"

namespace corral {

void multiply(const Kernels& kernels, const ort::Workers& workers, const Weights& weights, const float* x, int64_t rows,
              float* y) {
  const Products& products = products_of(kernels, weights.bits);
  std::vector<PanelPlace> places;
  cut_into_panels(0, rows, places);
  Activations activations(rows, weights.inputs);
  workers.each_worth(places.size(), kQuantizing * rows * weights.inputs.count, [&](size_t panel) {
    activations.quantize(
        kernels, places[panel], [&](int64_t row) { return x + row * weights.inputs.count; }, [](int64_t) { return 1.0f; });
  });
  activations.check("x");
  // A task is some tiles for all rows: weights are read from memory once.
  const int64_t tiles_per_task = rows == 1 ? 16 : 4, stride = weights.outputs();
  const int64_t tasks = (weights.tiles + tiles_per_task - 1) / tiles_per_task;
  workers.each_worth(tasks, rows * weights.inputs.count * stride / kProductsAtOnce, [&](size_t task) {
    const int64_t begin = int64_t(task) * tiles_per_task, end = std::min(begin + tiles_per_task, weights.tiles);
    for (const PanelPlace& place : places) {
      const Panel panel = activations.panel(place);
      float* out = y + place.first * stride;
      int64_t t = begin;
      for (; t + 2 <= end; t += 2) {
        products.two_tiles(weights.tile(0, t), weights.tile(0, t + 1), panel, weights.inputs, out + t * kTileOutputs,
                           stride);
      }
      if (t < end) products.one_tile(weights.tile(0, t), panel, weights.inputs, out + t * kTileOutputs, stride);
    }
  });
}

}  // namespace corral
