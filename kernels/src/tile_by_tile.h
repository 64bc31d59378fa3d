// For instruction sets that gain nothing from two tiles at once. In an unnamed namespace, as elementwise.h.
#pragma once

#include "kernels.h"

namespace corral {
namespace {

template <class Codes>
void one_tile(const Tile& tile, const Panel& panel, Inputs inputs, float* y, int64_t row_stride);

template <class Codes>
void two_tiles(const Tile& first, const Tile& second, const Panel& panel, Inputs inputs, float* y, int64_t row_stride) {
  one_tile<Codes>(first, panel, inputs, y, row_stride);
  one_tile<Codes>(second, panel, inputs, y + kTileOutputs, row_stride);
}

}  // namespace
}  // namespace corral
