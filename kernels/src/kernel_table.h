// What a kernel file has defined, as the table of its instruction set; included at its end. In an unnamed namespace, as
// elementwise.h.
#pragma once

#include "attention_kernels.h"
#include "elementwise.h"
#include "kernels.h"

namespace corral {
namespace {

template <class Codes>
constexpr Products kProducts{one_tile<Codes>, two_tiles<Codes>};

constexpr Kernels kKernels{quantize_row, kProducts<Int2>, kProducts<Int3>, kProducts<Int4>, kProducts<Int8>,
                           swiglu_rows,  norm_row,        add_rows,        kAttention};

}  // namespace
}  // namespace corral
