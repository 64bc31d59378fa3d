// The kernels of one weight format and tiling as a shared library: `launch_<entry>` runs one of them.
#include "shim_cuda_cpu.h"

#include "moe_down.cu"
#include "moe_gate_up.cu"
#include "moe_route.cu"

#define LAUNCHER(entry)                                                                                      \
  extern "C" void launch_##entry(const unsigned* grid, unsigned threads, void** arguments, unsigned seed) { \
    cpu::launch(entry, dim3(grid[0], grid[1], grid[2]), dim3(threads), arguments, seed);                    \
  }

LAUNCHER(moe_route)
LAUNCHER(moe_gate_up)
LAUNCHER(moe_down)
