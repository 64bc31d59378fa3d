"""The cost model of tiled experts: by hand for Scout, and what follows of it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.spec.expert_tiles import best_tiles, chosen_tiles, fitting_tiles, tiled_experts
from corral.spec.gpus import GPUS
from corral.spec.presets import PRESETS

SCOUT = PRESETS["scout"].model
MATRICES = 3 * 5120 * 8192  # of one expert
INT4 = MATRICES // 2 + MATRICES // 128 * 2  # codes, and a float16 scale a group


def test_a_token_of_scout_by_hand() -> None:
    """One tile: the copy is written and read, beside the codes. Eight: it stays in the 72 MiB of an RTX 4090's cache."""
    gpu = GPUS["rtx4090"]
    one, eight = (
        tiled_experts(SCOUT, weights="int4", group_size=128, gpu=gpu, tokens=1, tiles=tiles) for tiles in (1, 8)
    )
    assert (one.read_bytes, one.copy_bytes, one.in_cache) == (INT4, 2 * MATRICES, False)
    assert one.dram_bytes == INT4 + 4 * MATRICES
    assert (eight.read_bytes, eight.copy_bytes, eight.in_cache) == (INT4, MATRICES // 4, True)
    assert eight.dram_bytes == INT4
    assert eight.seconds == pytest.approx(INT4 / 1.008e12 + 8 * 5 * 2e-6)
    assert best_tiles(SCOUT, weights="int4", group_size=128, gpu=gpu) == 8


def test_blocks_of_a_prefill_by_hand() -> None:
    """512 tokens over 16 experts: blocks of 32 rows, each expert's first one and 15 more."""
    gpu = GPUS["rtx4090"]
    prefill = tiled_experts(SCOUT, weights="fp16", group_size=128, gpu=gpu, tokens=512, tiles=1)
    assert prefill.copy_bytes == prefill.read_bytes == 31 * 2 * MATRICES


def test_more_tiles_only_where_they_help_or_memory_is_short() -> None:
    choose = {name: best_tiles(SCOUT, weights="int4", group_size=128, gpu=gpu) for name, gpu in GPUS.items()}
    assert choose["h200"] == 1  # so fast a memory that kernels cost more than copies
    assert choose["rtx3090"] == 4  # too small a cache; but one tile's copies would take a third of its memory
    assert choose["rtx4090"] == choose["rtx5090"] == 8
    assert best_tiles(PRESETS["guard"].model, weights="int4", group_size=128, gpu=GPUS["rtx4090"]) == 1


def test_a_capability_means_each_gpu_that_has_it() -> None:
    def chosen(gpu: str) -> int:
        return chosen_tiles(SCOUT, weights="int4", group_size=128, gpu=gpu)

    assert (chosen(""), chosen("9.9"), chosen("RTX4090")) == (1, 1, 8)
    assert chosen("8.9") == chosen("l4") == 16
    assert chosen("rtx4090, l4") == 16


@given(tiles=st.sampled_from(fitting_tiles(SCOUT, 128)), tokens=st.integers(1, 2000), gpu=st.sampled_from(list(GPUS)))
def test_tiles_share_what_one_copies(tiles: int, tokens: int, gpu: str) -> None:
    one, some = (
        tiled_experts(SCOUT, weights="int4", group_size=128, gpu=GPUS[gpu], tokens=tokens, tiles=n) for n in (1, tiles)
    )
    assert some.copy_bytes * tiles == one.copy_bytes
    assert some.read_bytes == one.read_bytes <= some.dram_bytes <= one.dram_bytes


def test_tiles_hold_whole_groups() -> None:
    assert fitting_tiles(SCOUT, 128) == [1, 2, 4, 8, 16, 32, 64]
    assert fitting_tiles(dataclasses.replace(SCOUT, intermediate_size=768), 128) == [1, 2]
