"""The launch plan: grids that cover every routing, arguments as the sources declare them, refusals with their reason."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.graphs.engine.kernels.compile import SOURCES
from corral.graphs.engine.kernels.launch import (
    DECODE,
    FORMATS,
    KERNELS,
    PREFILL,
    TILINGS,
    MoeShape,
    buffers,
    check,
    launches,
    max_tiles,
    tiling_for,
)
from corral.spec.errors import InputError

SCOUT = MoeShape(hidden=5120, width=8192, experts=16, top_k=1, weights="int4", group_size=128)


def tiles(counts: list[int], tile_tokens: int) -> int:
    return sum(-(-count // tile_tokens) for count in counts)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=40), st.sampled_from([8, 64]))
def test_no_routing_needs_more_tiles_than_the_grid_has(counts: list[int], tile_tokens: int) -> None:
    assert tiles(counts, tile_tokens) <= max_tiles(sum(counts), len(counts), tile_tokens)


@given(st.integers(1, 500), st.integers(1, 40), st.sampled_from([8, 64]))
def test_some_routing_needs_all_of_them(visits: int, experts: int, tile_tokens: int) -> None:
    others = min(visits, experts) - 1  # one visit each; the first expert takes the rest
    assert tiles([visits - others] + [1] * others, tile_tokens) == max_tiles(visits, experts, tile_tokens)


def test_scout_decodes_one_token_with_every_expert_row_in_some_block() -> None:
    route, gate_up, down = launches(SCOUT, 1)
    assert (route.grid, route.threads) == ((1, 1, 1), 1024)
    assert (gate_up.grid, gate_up.threads) == ((1, 16384 // 32, 1), 256)
    assert (down.grid, down.threads) == ((1, 5120 // 32, 1), 256)
    table = buffers(SCOUT, 1)
    assert table["gate_up.codes"] == ("uint8", (16, 1024, 80, 512))
    assert table["gate_up.scales"] == ("float16", (16, 1024, 40, 8, 2))
    assert table["down.codes"] == ("uint8", (16, 320, 128, 512))


def test_the_tiling_follows_the_tokens_an_expert_gets() -> None:
    assert tiling_for(SCOUT, 1) is DECODE
    assert tiling_for(SCOUT, 255) is DECODE
    assert tiling_for(SCOUT, 256) is PREFILL
    assert tiling_for(dataclasses.replace(SCOUT, experts=128), 512) is DECODE
    assert tiling_for(dataclasses.replace(SCOUT, top_k=2), 128) is PREFILL


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: tiling.name)
def test_arguments_are_what_the_sources_declare(weights: str, tiling: object) -> None:
    shape = MoeShape(hidden=64, width=128, experts=8, top_k=1, weights=weights, group_size=64 * (weights == "int4"))
    value_of = {"tokens": 9, "hidden": 64, "width": 128, "experts": 8, "top_k": 1, "group_size": shape.group_size}
    for launch in launches(shape, 9, tiling):  # type: ignore[arg-type]
        text = (SOURCES / launch.kernel.source).read_text(encoding="utf-8")
        declared = re.search(rf"{launch.kernel.entry}\((.*?)\)\s*\{{", text, re.S)
        assert declared
        without_scales = re.sub(r"#if.*?#endif", "", declared[1], flags=re.S)
        parameters = re.sub(r"#.*", "", declared[1]) if weights != "fp16" else without_scales
        names = [parameter.split()[-1].lstrip("*") for parameter in parameters.split(",")]
        assert len(names) == len(launch.arguments)
        for name, argument in zip(names, launch.arguments, strict=True):
            if isinstance(argument, int):
                assert argument == value_of[name], name
            else:
                assert argument.split(".")[-1] == name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": "int3"}, "weights are 'int3', expected one of int4, fp8, fp16"),
        ({"hidden": 5000}, "hidden size 5000 is not a multiple of 64"),
        ({"hidden": 0}, "hidden size 0 is not"),
        ({"width": 100}, "expert width 100 is not a multiple of 64"),
        ({"experts": 12}, "12 experts: expected 8, 16"),
        ({"experts": 2048}, "2048 experts"),
        ({"top_k": 0}, "0 experts a token, of 16"),
        ({"top_k": 17}, "17 experts a token, of 16"),
        ({"group_size": 16}, "group size 16: expected one of"),
        ({"group_size": 128, "width": 8192 + 64}, "group size 128: expected one of .* that divides 5120 and 8256"),
        ({"weights": "fp8"}, "fp8 weights have no group size, got 128"),
        ({"hidden": 64 * 16400}, "1049600 by 8192: more than 1048576 outputs"),
    ],
)
def test_sizes_the_kernels_cannot_do_are_refused(change: dict[str, int | str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check(dataclasses.replace(SCOUT, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [0, -1, 4194304])
def test_numbers_of_tokens_that_do_not_count_are_refused(tokens: int) -> None:
    with pytest.raises(InputError, match=f"{tokens} tokens at once; .* take 1 to 4194303 of"):
        launches(SCOUT, tokens)


@pytest.mark.parametrize("experts", [16, 128])
def test_published_models_are_accepted(experts: int) -> None:
    check(dataclasses.replace(SCOUT, experts=experts))


def test_kernel_names_are_unique() -> None:
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS) == 13
