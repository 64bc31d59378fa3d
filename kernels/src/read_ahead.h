// Weights that are mapped from a file and not in memory yet. The system reads a page when it is touched, and as few around
// it as it dares; an expert's matrices are known to be wanted whole as soon as a token chose it.
#pragma once

#include <cstdint>

#include "weights.h"

namespace corral {

// Asks the system to read one expert's part of a matrix, where some of it is missing; returns before it is there. Never
// fails: what is not read ahead is read when it is touched.
void read_ahead(const Weights& weights, int64_t expert);

void read_ahead(const void* begin, int64_t bytes);

}  // namespace corral
