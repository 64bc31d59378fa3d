"""A decoder in several stages: the same logits, graphs and weights apart, balanced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from corral.graphs import compile
from corral.runtime import LLM, SamplingParams
from corral.spec.bundle import Bundle, open_bundle
from corral.spec.errors import InputError
from corral.spec.recipe import Recipe

Checkpoint = Callable[[str], Path]
TinyBundle = Callable[[str, str, str], Path]


def compiled(checkpoint: Path, out: Path, target: str = "cpu", *, stages: int) -> Bundle:
    return compile(checkpoint, out, Recipe(target=target, weights="int4", group_size=32, stages=stages))


def shards(bundle: Bundle, graph: int) -> set[str]:
    model = onnx.load(bundle.path(bundle.manifest.graphs[graph].path), load_external_data=False)
    return {
        pair.value for tensor in model.graph.initializer for pair in tensor.external_data if pair.key == "location"
    }  # fmt: skip


@pytest.mark.parametrize("target", ["portable", "cpu"])
@pytest.mark.parametrize("form", ["scout", "maverick", "tied"])
def test_stages_compute_what_the_whole_decoder_computes(
    tiny_checkpoint: Checkpoint, tiny_bundle: TinyBundle, tmp_path: Path, form: str, target: str
) -> None:
    """Over a chunk boundary, prefill and decode. One layer a stage: every cut there is."""
    whole = LLM(tiny_bundle(form, target, "int4"))
    bundle = compiled(tiny_checkpoint(form), tmp_path / "out", target, stages=whole.config.num_layers)
    assert len(bundle.manifest.graphs) == whole.config.num_layers
    for graph in bundle.manifest.graphs:
        onnx.checker.check_model(bundle.path(graph.path))
    staged, ids = LLM(bundle), np.random.default_rng(3).integers(0, 256, 75)
    want = whole.score(ids)
    assert np.abs(staged.score(ids) - want).max() <= 1e-5 * np.abs(want).max()
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = [ids[:30].tolist(), ids[:7].tolist()]
    assert [c.token_ids for c in staged.generate(prompts, params)] == [
        c.token_ids for c in whole.generate(prompts, params)
    ]


def test_each_stage_has_shards_of_its_own_and_they_are_balanced(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    bundle = compiled(tiny_checkpoint("scout"), tmp_path / "out", stages=2)
    first, second = (shards(bundle, i) for i in range(2))
    table = bundle.manifest.embedding
    assert table is not None
    assert first.isdisjoint(second)
    assert table.path not in first | second
    sizes = [sum(bundle.path(name).stat().st_size for name in names) for names in (first, second)]
    assert max(sizes) < 0.7 * sum(sizes)


def test_the_bytes_of_a_weight_do_not_depend_on_stages(
    tiny_checkpoint: Checkpoint, tiny_bundle: TinyBundle, tmp_path: Path
) -> None:
    def weights(bundle: Bundle) -> dict[str, bytes]:
        graphs = [onnx.load(bundle.path(graph.path)).graph for graph in bundle.manifest.graphs]
        return {
            tensor.name: tensor.raw_data for graph in graphs for tensor in graph.initializer if "layers." in tensor.name
        }

    staged = compiled(tiny_checkpoint("scout"), tmp_path / "out", stages=3)
    assert weights(staged) == weights(open_bundle(tiny_bundle("scout", "cpu", "int4")))


def test_a_limit_makes_as_many_stages_as_it_takes(tmp_path: Path) -> None:
    from corral.graphs.compiler import lower
    from corral.graphs.split_stages import stage_ranges
    from corral.model.checkpoint.open import open_checkpoint

    scout = open_checkpoint("synthetic:scout?layers=8")  # 1.2 GB a layer, and 0.5 GB of head
    for limit, count in ((20, 1), (6, 2), (4, 3)):
        work = lower(scout, Recipe(stage_gb=limit))
        assert len(stage_ranges(work)) == count
    work.recipe = Recipe(stage_gb=1)
    with pytest.raises(InputError, match=r"the largest layer .* has 1\.\d GB of weights, more than the 1 GB"):
        stage_ranges(work)


def test_more_stages_than_layers_are_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="9 stages were asked for, but the model has 5 layers"):
        compiled(tiny_checkpoint("scout"), tmp_path / "out", stages=9)
    assert not (tmp_path / "out").exists()
