"""Engines whose weights may stay on the host: how much of them the GPU keeps, and that the answers are the same."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corral.runtime import LLM
from corral.runtime.gpu.device_kv_cache import slot_bytes
from corral.runtime.gpu.tensorrt_session import TensorRTSession
from corral.runtime.gpu.weight_streaming import HEADROOM_BYTES, weight_budgets
from corral.runtime.onnxruntime_session import OnnxRuntimeSession
from corral.spec.bundle import Bundle
from corral.spec.errors import EnvironmentProblem

WEIGHTS = 100  # fewer than the bytes of the file, as in an engine
EngineBundle = Callable[..., Bundle]
Install = Callable[..., Any]


@pytest.fixture
def streamed(engine_bundle: EngineBundle, tmp_path: Path) -> Bundle:
    """A bundle compiled with --weight-streaming; its engine has 100 bytes of weights that may stream."""
    made = engine_bundle("scout")
    shutil.copytree(made.directory, tmp_path / "copy")
    recipe = dataclasses.replace(made.manifest.recipe, weight_streaming=True)
    bundle = Bundle(tmp_path / "copy", dataclasses.replace(made.manifest, recipe=recipe))
    path = bundle.path(bundle.manifest.engines[0].path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"streamable": WEIGHTS}))
    return bundle


def room(bundle: Bundle, weights: int) -> int:
    """Free memory that leaves so many bytes for weights."""
    caches = 2 * sum(slot_bytes(bundle.manifest.kv)) * bundle.manifest.recipe.max_batch
    return weights + caches + HEADROOM_BYTES


@pytest.mark.parametrize(("free", "recorded"), [(1 << 20, True), (0, False)])
def test_an_engine_keeps_what_fits_and_answers_the_same(
    streamed: Bundle, install: Install, free: int, recorded: bool
) -> None:
    """All of its weights, or none; steps are recorded only where none stream."""
    device = install(free=room(streamed, free))
    session = TensorRTSession(streamed, open_device=lambda: device)
    ids = np.random.default_rng(0).integers(0, 256, 20)
    got = LLM(streamed, session=session).score(ids)
    want = LLM(streamed, session=OnnxRuntimeSession(streamed, threads=1), max_context=64).score(ids)
    assert np.abs(got - want).max() < 4e-3 * np.abs(want).max()
    assert ("launch" in device.log) == recorded


def test_stages_share_what_the_caches_leave_by_size(streamed: Bundle, install: Install) -> None:
    engine = streamed.manifest.engines[0]
    large = dataclasses.replace(engine, path="large.engine")
    small = dataclasses.replace(engine, path="small.engine")
    streamed.path(large.path).write_bytes(bytes(3000))
    streamed.path(small.path).write_bytes(bytes(1000))
    for weights, budgets in (
        (8000, [3000, 1000]),
        (4000, [3000, 1000]),
        (2000, [1500, 500]),
        (0, [0, 0]),
        (-9, [0, 0]),
    ):
        device = install(free=weights + 500 + HEADROOM_BYTES)
        assert weight_budgets(streamed, [large, small], device, 500) == budgets
    whole = dataclasses.replace(streamed.manifest.recipe, weight_streaming=False)
    other = Bundle(streamed.directory, dataclasses.replace(streamed.manifest, recipe=whole))
    assert weight_budgets(other, [large, small], install(), 500) == [None, None]


def test_a_budget_that_is_not_taken_is_said(streamed: Bundle, install: Install) -> None:
    device = install(free=room(streamed, 1 << 20))
    path = streamed.path(streamed.manifest.engines[0].path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"most_budget": 1}))
    with pytest.raises(EnvironmentProblem, match=r"does not keep 0\.00 GB of the weights.*without --weight-streaming"):
        TensorRTSession(streamed, open_device=lambda: device)
