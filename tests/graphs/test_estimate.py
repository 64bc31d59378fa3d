"""The formulas of `corral plan` agree with the exact plan, kind by kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from corral.graphs.compiler import lower
from corral.graphs.coverage import coverage
from corral.model.checkpoint import open_checkpoint
from corral.model.checkpoint.names import EMBEDDING
from corral.spec.estimate import Serving, estimate
from corral.spec.gpus import GPUS
from corral.spec.recipe import Recipe


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("form", ["multimodal", "maverick", "guard", "tied"])
def test_bytes_of_every_kind(tiny_checkpoint: Callable[[str], Path], form: str, weights: str) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(form))
    work = lower(checkpoint, Recipe(target="cpu", weights=weights, group_size=32))
    exact = {row.kind: row.bytes for row in coverage(work.plan)}
    dtype = checkpoint.info(EMBEDDING).dtype
    serving = Serving(weights=weights, group_size=32, dtype=dtype, context=1)
    assert estimate(checkpoint.config, serving, GPUS["h100"]).weights == exact
