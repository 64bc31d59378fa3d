"""In how many tiles of columns an engine multiplies by its experts, and what that moves: a cost model, nothing measured.

A builder writes the chosen experts' matrices to memory, in 16 bits or FP8, before it multiplies by them. Cut into tiles
that are taken one after the other, each tile's copy is written where the last one's was. Where a tile's copy stays in the
GPU's level-2 cache, only the weights as they are stored come from DRAM; a tile costs a few more kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

from corral.spec.gpus import Gpu, gpus_meant
from corral.spec.model_config import ModelConfig
from corral.spec.storage import WEIGHT_BITS

MAX_BLOCK = 64  # rows of a block of the block-aligned experts: a matrix kernel's tile
COPY_BITS = {"fp8": 8, "w4a8": 8}  # of a number in a copy; of other weights 16
CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
KERNELS = 5  # of a tile, as seen in schedules of TensorRT for RTX 1.7.1
KERNEL_SECONDS = 2e-6  # assumed: from one kernel of a recorded step to the next
USABLE_L2 = 0.75  # assumed: of the cache, before copies fall out of it
PREFILL_TOKENS = 512
COPY_SHARE = 1 / 8  # of a GPU's memory that the copies of a prefill may take


@dataclass(frozen=True, kw_only=True)
class TiledExperts:
    """One MoE layer in a step of so many tokens. Bytes; `copy_bytes` is one tile's, which is the memory that it takes."""

    tiles: int
    tokens: int
    read_bytes: int  # of the experts' weights, as stored
    copy_bytes: int
    in_cache: bool
    dram_bytes: int
    seconds: float  # at least: DRAM at its full bandwidth, and kernels one after the other


def tiled_experts(
    config: ModelConfig, *, weights: str, group_size: int, gpu: Gpu, tokens: int, tiles: int
) -> TiledExperts:
    """What a MoE layer moves. Every block of rows reads its expert's matrices anew, which is the most that can be."""
    blocks = _blocks(config, tokens)
    matrix = 3 * config.hidden_size * config.intermediate_size
    bits, scaled = WEIGHT_BITS[weights]
    read = int(blocks * matrix * (bits + (16 / group_size if scaled else 0))) // 8
    copy = blocks * matrix * COPY_BITS.get(weights, 16) // 8 // tiles
    in_cache = copy + read // tiles <= USABLE_L2 * gpu.l2_bytes
    dram = read + (0 if in_cache else 2 * copy * tiles)
    return TiledExperts(
        tiles=tiles,
        tokens=tokens,
        read_bytes=read,
        copy_bytes=copy,
        in_cache=in_cache,
        dram_bytes=dram,
        seconds=dram / gpu.bandwidth + tiles * KERNELS * KERNEL_SECONDS,
    )


def best_tiles(config: ModelConfig, *, weights: str, group_size: int, gpu: Gpu) -> int:
    """The number of tiles with which a token is decoded soonest, of those that leave a prefill enough memory."""
    if not config.num_local_experts:
        return 1

    def cost(tiles: int) -> tuple[bool, float]:
        decode, prefill = (
            tiled_experts(config, weights=weights, group_size=group_size, gpu=gpu, tokens=tokens, tiles=tiles)
            for tokens in (1, PREFILL_TOKENS)
        )
        return prefill.copy_bytes > COPY_SHARE * gpu.memory_bytes, decode.seconds

    return min(fitting_tiles(config, group_size), key=cost)


def chosen_tiles(config: ModelConfig, *, weights: str, group_size: int, gpu: str) -> int:
    """For a recipe's `gpu`: the most that any of the GPUs meant asks for, as more cost the others little; 1 for none."""
    meant = [found for name in gpu.split(",") for found in gpus_meant(name.strip())]
    return max((best_tiles(config, weights=weights, group_size=group_size, gpu=found) for found in meant), default=1)


def fitting_tiles(config: ModelConfig, group_size: int) -> list[int]:
    """The numbers of tiles that cut the experts into whole groups of inputs."""
    return [tiles for tiles in CANDIDATES if config.intermediate_size % (tiles * group_size) == 0] or [1]


def _blocks(config: ModelConfig, tokens: int) -> int:
    """Blocks of rows for so many tokens, as `graphs/lower/tensorrt/moe.py` counts them."""
    visits, experts = tokens * config.num_experts_per_tok, config.num_local_experts
    block, visited = min(max(visits // experts, 1), MAX_BLOCK), min(visits, experts)
    return min(visited + (visits - visited) // block, visits)
