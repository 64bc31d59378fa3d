// The codes of a tile unpacked, written once: a vector kernel file includes this after it has said what `Bytes` are (vector,
// masked, left, right, either). In an unnamed namespace, as elementwise.h. The layout is that of kernels.h.
#pragma once

#include "kernels.h"

namespace corral {
namespace {

// `kStep` inputs at a time, which fill whole vectors. load<Four> gives a byte for each code of the `Four`th four inputs of a
// step: of as many outputs as a vector holds.
template <int bits>
struct Packed {
  static constexpr int32_t kBits = bits, kShared = 8 / bits, kStep = 4 * kShared;

  template <int Four>
  static inline Bytes load(const uint8_t* step) {
    return masked(right<bits * (Four % kShared)>(vector(step + 64 * (Four / kShared))), (1 << bits) - 1);
  }
};

using Int2 = Packed<2>;
using Int4 = Packed<4>;

struct Int3 {
  static constexpr int32_t kBits = 3, kStep = 32;

  template <int Four>
  static inline Bytes load(const uint8_t* step) {
    const Bytes high = left<(Four < 2 ? 2 - Four : 0)>(right<(Four > 2 ? Four - 2 : 0)>(vector(step + 128)));
    return either(Int2::load<Four>(step), masked(high, 4));
  }
};

}  // namespace
}  // namespace corral
