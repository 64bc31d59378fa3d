"""What the compiler and the CPU custom-op library agree on: names, version, tile. Equal to kernels/src/library.cc's."""

from __future__ import annotations

# The library in a manifest's `requires`, and the version of its operators and of the layout they read.
LIBRARY = "corral_cpu_ops"
VERSION = 2
DOMAIN = "corral.cpu"
TILE_OUTPUTS = 16  # a stored matrix is cut into tiles of as many outputs
WEIGHTS = ("int8", "int4", "int3", "int2")
