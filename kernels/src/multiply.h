// y = x W for one matrix.
#pragma once

#include "kernels.h"
#include "ort_api.h"
#include "weights.h"

namespace corral {

// x [rows, inputs], y [rows, outputs]
void multiply(const Kernels& kernels, const ort::Workers& workers, const Weights& weights, const float* x, int64_t rows,
              float* y);

}  // namespace corral
