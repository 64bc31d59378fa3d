"""Cache rows and bytes of the two KV classes, and where work is cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.spec.kv_layout import kv_layouts, split_at_chunks
from corral.spec.model_config import parse_config


def test_layouts_of_scout(tiny_config: Callable[[str], dict[str, Any]]) -> None:
    chunked, every = kv_layouts(parse_config(tiny_config("scout")))
    assert (chunked.kv_class, chunked.layers, chunked.chunk) == ("chunked", (0, 1, 2, 4), 16)
    assert (every.kv_class, every.layers, every.chunk) == ("global", (3,), None)
    assert [chunked.filled_rows(p) for p in (0, 15, 16, 17, 40)] == [0, 15, 0, 1, 8]
    assert [every.filled_rows(p) for p in (0, 15, 16, 17, 40)] == [0, 15, 16, 17, 40]
    assert [chunked.capacity(c) for c in (3, 16, 100)] == [3, 16, 16]
    assert every.capacity(100) == 100


def test_bytes_of_scout_at_128k(tiny_config: Callable[[str], dict[str, Any]]) -> None:
    """The published model at bf16: 36 layers of at most 8192 rows, 12 of all, 8 heads of 128, keys and values."""
    published = {"num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
                 "attention_chunk_size": 8192}  # fmt: skip
    layouts = kv_layouts(parse_config(tiny_config("scout") | published))
    assert [dataclasses.replace(layout, dtype="bfloat16").bytes(131072) for layout in layouts] == [
        2 * 36 * 8 * 128 * 8192 * 2,
        2 * 12 * 8 * 128 * 131072 * 2,
    ]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "items"),
    [
        ("float32", 128, 128),
        ("float16", 128, 128),
        ("int8", 128, 128 + 2),
        ("int8", 64, 64 + 2),
        ("int8", 256, 256 + 4),
        ("int4", 128, 64 + 8),
        ("int4", 16, 8 + 2),
    ],
)
def test_rows_of_codes_carry_their_scales(
    tiny_config: Callable[[str], dict[str, Any]], dtype: str, head_dim: int, items: int
) -> None:
    layout = dataclasses.replace(kv_layouts(parse_config(tiny_config("scout")))[0], dtype=dtype, head_dim=head_dim)
    assert layout.row_items == items
    bytes_an_item = {"float32": 4, "float16": 2}.get(dtype, 1)
    assert layout.row_bytes() == 2 * len(layout.layers) * layout.num_heads * items * bytes_an_item


def test_a_model_without_chunks_has_one_class(tiny_config: Callable[[str], dict[str, Any]]) -> None:
    layouts = kv_layouts(parse_config(tiny_config("scout") | {"attention_chunk_size": None}))
    assert [(layout.kv_class, layout.layers) for layout in layouts] == [("global", (0, 1, 2, 3, 4))]


@pytest.mark.parametrize(
    ("start", "count", "chunk", "limit", "expected"),
    [
        (0, 40, 16, None, [(0, 16), (16, 16), (32, 8)]),
        (15, 2, 16, None, [(15, 1), (16, 1)]),
        (16, 16, 16, None, [(16, 16)]),
        (10, 30, None, None, [(10, 30)]),
        (10, 30, 16, 4, [(10, 4), (14, 2), (16, 4), (20, 4), (24, 4), (28, 4), (32, 4), (36, 4)]),
        (5, 0, 16, None, []),
    ],
)
def test_split_by_hand(
    start: int, count: int, chunk: int | None, limit: int | None, expected: list[tuple[int, int]]
) -> None:
    assert split_at_chunks(start, count, chunk, limit) == expected


@given(
    start=st.integers(0, 100),
    count=st.integers(0, 100),
    chunk=st.none() | st.integers(1, 20),
    limit=st.none() | st.integers(1, 20),
)
def test_split_covers_everything_once_within_chunks(
    start: int, count: int, chunk: int | None, limit: int | None
) -> None:
    pieces = split_at_chunks(start, count, chunk, limit)
    assert [p for position, length in pieces for p in range(position, position + length)] == list(
        range(start, start + count)
    )
    assert all(length >= 1 for _, length in pieces)
    assert all(limit is None or length <= limit for _, length in pieces)
    assert all(chunk is None or position // chunk == (position + length - 1) // chunk for position, length in pieces)
