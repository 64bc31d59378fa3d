// Rows of activations, quantized: cut into panels as even as possible, one after the other in memory.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "ort_api.h"

namespace corral {

// In operations of floats, as ort::Workers counts them: quantizing a value takes as long as four, and as many products of
// small integers are made in the time of one.
constexpr int64_t kQuantizing = 4, kProductsAtOnce = 4;

// Rows first … first + rows - 1 of a call.
struct PanelPlace {
  int64_t first, rows;
};

inline void cut_into_panels(int64_t first, int64_t rows, std::vector<PanelPlace>& places) {
  const int64_t count = (rows + kPanelRows - 1) / kPanelRows;
  for (int64_t i = 0; i < count; i++) {
    const int64_t begin = rows * i / count, end = rows * (i + 1) / count;
    places.push_back({first + begin, end - begin});
  }
}

class Activations {
 public:
  Activations(int64_t rows, Inputs inputs)
      : inputs_(inputs),
        codes_(rows * inputs.count),
        scales_(rows * (inputs.count / inputs.group)),
        sums_(rows * (inputs.count / inputs.group)) {}

  Inputs inputs() const { return inputs_; }

  Panel panel(const PanelPlace& place) const {
    const int64_t group = place.first * (inputs_.count / inputs_.group);
    return {codes_.get() + place.first * inputs_.count, scales_.get() + group, sums_.get() + group, place.rows};
  }

  // Quantizes the rows of one panel; `row_of(i)` is where row i lies, `gain_of(i)` what multiplies it.
  template <class RowOf, class GainOf>
  void quantize(const Kernels& kernels, const PanelPlace& place, RowOf row_of, GainOf gain_of) {
    const Panel into = panel(place);
    for (int64_t row = 0; row < place.rows; row++) {
      const int64_t at = place.first + row;
      if (!kernels.quantize(row_of(at), gain_of(at), inputs_, into, row)) finite_ = false;
    }
  }

  // Quantizes one group of the rows of a panel, `values` [rows, group].
  void quantize_group(const Kernels& kernels, const PanelPlace& place, int64_t group, const float* values) {
    const Panel whole = panel(place);
    const int64_t at = group * place.rows;
    const Panel into{whole.codes + at * inputs_.group, whole.scales + at, whole.sums + at, place.rows};
    for (int64_t row = 0; row < place.rows; row++) {
      if (!kernels.quantize(values + row * inputs_.group, 1.0f, {inputs_.group, inputs_.group}, into, row)) finite_ = false;
    }
  }

  // To be called when all panels are quantized. Throws where a value was not finite: it would silently have become some
  // other number.
  void check(const char* what) const {
    if (!finite_) {
      throw ort::Failure(ort::kInvalidArgument, std::string(what) + " holds a value that is infinite or not a number: "
                                                "weights or caches are damaged, or the model overflows");
    }
  }

 private:
  Inputs inputs_;
  Buffer<int8_t> codes_;
  Buffer<float> scales_;
  Buffer<int32_t> sums_;
  std::atomic<bool> finite_{true};
};

}  // namespace corral
