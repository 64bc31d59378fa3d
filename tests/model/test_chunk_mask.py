"""Who sees whom: attention's masks, worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from corral.model.text import ChunkedAttention, Rotary
from corral.spec.model_config import ModelConfig, parse_config

CHUNKED = """
    x.......
    xx......
    xxx.....
    xxxx....
    ....x...
    ....xx..
    ....xxx.
    ....xxxx
"""
CAUSAL = """
    x.......
    xx......
    xxx.....
    xxxx....
    xxxxx...
    xxxxxx..
    xxxxxxx.
    xxxxxxxx
"""
# Positions 2 to 9: two tokens of the first chunk, a whole chunk, two of a third. A sliding window would differ.
CHUNKED_FROM_2 = """
    x.......
    xx......
    ..x.....
    ..xx....
    ..xxx...
    ..xxxx..
    ......x.
    ......xx
"""


@pytest.fixture(scope="module")
def config(tiny_config: Callable[[str], dict[str, Any]]) -> ModelConfig:
    """Heads as wide as there are tokens, so that a value can say which token it is; chunks of four."""
    return parse_config(
        tiny_config("scout")
        | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "attention_chunk_size": 4}
    )


def seen(config: ModelConfig, layer: int, first: int) -> str:
    """A zero query attends evenly to all it sees, and each value is one-hot: the output is the mask."""
    core = ChunkedAttention(config, config.layers[layer])
    rotary = Rotary(cos_BSd=torch.ones(1, 8, 4), sin_BSd=torch.zeros(1, 8, 4), temperature_BS=None)
    positions, value = torch.arange(first, first + 8)[None], torch.eye(8)[None]
    out, _, _ = core(torch.zeros(1, 8, 8), torch.ones(1, 8, 8), value, rotary, positions, None, None, None)
    return drawn(out[0])


def drawn(weights: Tensor) -> str:
    return "\n".join("".join("x" if w > 0 else "." for w in row) for row in weights)


@pytest.mark.parametrize(
    ("layer", "first", "expected"),
    [(0, 0, CHUNKED), (0, 2, CHUNKED_FROM_2), (3, 0, CAUSAL), (3, 2, CAUSAL)],
    ids=["chunked", "chunked from position 2", "global", "global from position 2"],
)
def test_mask(config: ModelConfig, layer: int, first: int, expected: str) -> None:
    assert seen(config, layer, first) == "\n".join(line.strip() for line in expected.split())


def test_temperature_by_hand(reference: Callable[[str], Any]) -> None:
    """floor_scale 8, attn_scale 0.1: the query grows at positions 7, 15, 23 … by log1p of how often."""
    rotary = reference("scout").rotary(torch.tensor([[0, 6, 7, 14, 15, 22, 23]]))
    assert rotary.temperature_BS is not None
    expected = torch.tensor([[1, 1, 1.0693147, 1.0693147, 1.1098612, 1.1098612, 1.1386294]])
    assert torch.allclose(rotary.temperature_BS, expected, rtol=0, atol=1e-6)
