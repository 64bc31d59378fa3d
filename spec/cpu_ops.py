"""What the compiler and the CPU custom-op library agree on: names, version, tile. Equal to kernels/src/library.cc's."""

from __future__ import annotations

# The library in a manifest's `requires`, and the version of its operators and of the layout they read.
LIBRARY = "corral_cpu_ops"
VERSION = 3
DOMAIN = "corral.cpu"
TILE_OUTPUTS = 16  # a stored matrix is cut into tiles of as many outputs
WEIGHTS = ("int8", "int4", "int3", "int2")
# What TiledExperts takes of TiledMoE's inputs: x, router logits, codes and scales; zero points, which are optional.
ROUTED_INPUTS = (slice(0, 6), slice(10, 12))
# Attention computes in lanes of as many floats, and on heads of at most so many.
LANES, LARGEST_HEAD = 16, 256


def attends(head_dim: int, group: int | None = None) -> bool:
    """Whether the library has attention for heads of this width, with caches that are quantized in such groups."""
    whole = group is None or head_dim % min(group, head_dim) == 0
    return head_dim % LANES == 0 and head_dim <= LARGEST_HEAD and whole
