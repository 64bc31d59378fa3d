"""Engines of a decoder in stages: one a stage, whose graphs one after the other compute what the whole one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from corral.graphs import compile
from corral.graphs.engine.engines import build_engines
from corral.runtime import LLM, SamplingParams
from corral.spec import graph_io
from corral.spec.bundle import Bundle, open_bundle
from corral.spec.recipe import Recipe
from corral.validate.engine_graph import as_ready

pytest.importorskip("tensorrt_rtx")

Checkpoint = Callable[[str], Path]
TinyBundle = Callable[[str, str, str], Path]


def staged(checkpoint: Path, out: Path, stages: int) -> Bundle:
    return compile(checkpoint, out, Recipe(target="tensorrt-rtx", weights="int4", group_size=32, stages=stages))


def graphs_of(bundle: Bundle) -> LLM:
    """The bundle run as if it had its engines: its graphs, in their places."""
    return LLM(as_ready(bundle))


@pytest.mark.parametrize("form", ["scout", "maverick"])
def test_graphs_of_stages_compute_what_the_whole_one_does(
    tiny_checkpoint: Checkpoint, tiny_bundle: TinyBundle, tmp_path: Path, form: str
) -> None:
    """Over a chunk boundary, prefill and decode. One layer a stage: every cut there is."""
    whole = graphs_of(open_bundle(tiny_bundle(form, "tensorrt-rtx", "int4")))
    bundle = staged(tiny_checkpoint(form), tmp_path / "out", whole.config.num_layers)
    assert len(bundle.manifest.graphs) == whole.config.num_layers
    stages, ids = graphs_of(bundle), np.random.default_rng(3).integers(0, 256, 75)
    np.testing.assert_array_equal(stages.score(ids), whole.score(ids))
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = [ids[:30].tolist(), ids[:7].tolist()]
    assert [c.token_ids for c in stages.generate(prompts, params)] == [
        c.token_ids for c in whole.generate(prompts, params)
    ]


def test_each_stage_becomes_an_engine_that_takes_what_the_one_before_leaves(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Maverick in three stages: dense and MoE layers, both KV classes, the last one with the head."""
    staged(tiny_checkpoint("maverick"), tmp_path / "out", 3)
    bundle = build_engines(tmp_path / "out", gpu="8.9")
    manifest = bundle.manifest
    assert [engine.graph for engine in manifest.engines] == [graph.path for graph in manifest.graphs]
    about = [json.loads(bundle.path(engine.sidecar).read_text()) for engine in manifest.engines]
    names = [[{tensor["name"] for tensor in each[way]} for each in about] for way in ("inputs", "outputs")]
    for inputs, outputs, graph, end in zip(*names, manifest.graphs, (False, False, True), strict=True):
        layers = range(graph.first_layer, graph.end_layer)
        assert {i for i in range(5) if graph_io.past_key(i) in inputs} == set(layers)
        assert (graph_io.EMBEDDINGS in inputs, graph_io.HIDDEN in inputs) == (0 in layers, 0 not in layers)
        assert (graph_io.LOGITS in outputs, graph_io.NEXT_HIDDEN in outputs) == (end, not end)
    assert all([profile["name"] for profile in each["profiles"]] == ["decode", "prefill"] for each in about)
