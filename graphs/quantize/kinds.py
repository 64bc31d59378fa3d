"""Which kind of weight a parameter is, and which kinds are quantized: one table, read top to bottom."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightKind:
    """A row of the coverage table. `reason` says why a kind that is not quantized is kept in float."""

    name: str
    pattern: str
    quantized: bool
    reason: str = ""


KINDS = (
    WeightKind("experts", r"feed_forward\.experts\.", True),
    WeightKind("shared expert", r"feed_forward\.shared_expert\.", True),
    WeightKind("attention", r"self_attn\.", True),
    WeightKind("router", r"feed_forward\.router\.", False, "0.01 % of the weights, and it decides which expert runs"),
    WeightKind("dense", r"feed_forward\.(gate|up|down)_proj", True),
    WeightKind("head", r"^lm_head\.", True),
    WeightKind(
        "embedding",
        r"^embed",
        False,
        "a table that is gathered, never multiplied: stored as published, or as a rule says",
    ),
    WeightKind("norm", r"norm\.weight$", False, "vectors"),
)


def kind_of(weight: str) -> WeightKind:
    """The kind of a parameter by its name."""
    for kind in KINDS:
        if re.search(kind.pattern, weight):
            return kind
    raise AssertionError(f"no weight kind matches {weight}")
