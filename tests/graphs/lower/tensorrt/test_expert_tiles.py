"""Experts in tiles: the same numbers, stored apart; the same answers; less memory for what is dequantized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from corral.graphs import compile
from corral.graphs.engine.engines import build_engines
from corral.runtime import LLM
from corral.spec.bundle import Bundle, open_bundle
from corral.spec.errors import InputError
from corral.spec.recipe import Recipe
from corral.validate.engine_graph import as_ready

DEMO = Path(__file__).parents[4] / "demo" / "demo-scout"
Checkpoint = Callable[[str], Path]
TinyBundle = Callable[[str, str, str], Path]


def tiled(checkpoint: Path, out: Path, weights: str = "int4", tiles: int = 2, **more: Any) -> Bundle:
    recipe = Recipe(
        target="tensorrt-rtx", weights=weights, group_size=32, expert_tiles=tiles, calibration_tokens=4096, **more
    )
    return compile(checkpoint, out, recipe)


def weights_of(bundle: Bundle) -> dict[str, np.ndarray]:
    model = onnx.load(bundle.path(bundle.manifest.graphs[0].path))
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def score(bundle: Bundle) -> np.ndarray:
    """Logits of random tokens, the lowered graph in the engine's place."""
    return LLM(as_ready(bundle)).score(np.random.default_rng(3).integers(0, 256, 40))


@pytest.mark.parametrize(("weights", "method"), [("fp16", "rtn"), ("int4", "rtn"), ("int4", "gptq"), ("int4", "awq")])
def test_tiles_are_the_columns_of_the_whole(
    tiny_checkpoint: Checkpoint, tmp_path: Path, weights: str, method: str
) -> None:
    bundles = [tiled(tiny_checkpoint("scout"), tmp_path / f"{n}", weights, n, method=method) for n in (1, 2)]
    whole, parts = map(weights_of, bundles)
    for end in (".codes", ".scales") if weights == "int4" else ("",):
        for i in range(5):
            experts = f"layers.{i}.feed_forward.experts"
            gate, up = np.split(whole[f"{experts}.gate_up_proj{end}"], 2, axis=2)
            halves = [np.split(parts[f"{experts}.gate_up_proj{end}.{tile}"], 2, axis=2) for tile in range(2)]
            np.testing.assert_array_equal(np.concatenate([half[0] for half in halves], axis=2), gate)
            np.testing.assert_array_equal(np.concatenate([half[1] for half in halves], axis=2), up)
            down = [parts[f"{experts}.down_proj{end}.{tile}"] for tile in range(2)]
            np.testing.assert_array_equal(np.concatenate(down, axis=1), whole[f"{experts}.down_proj{end}"])
    assert bundles[0].manifest.coverage == bundles[1].manifest.coverage


def test_tiles_of_fp8_share_scales_and_what_rounds_their_inputs(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Codes lie [outputs, inputs]; an output has one gain, whichever tile of its inputs is multiplied."""
    whole, parts = (weights_of(tiled(tiny_checkpoint("scout"), tmp_path / f"{n}", "fp8", n)) for n in (1, 2))
    for i in range(5):
        gate_up, down = (f"layers.{i}.feed_forward.experts.{name}_proj" for name in ("gate_up", "down"))
        for end, axis in ((".codes", 1), (".gains", 2)):
            gate, up = np.split(whole[gate_up + end], 2, axis=axis)
            halves = [np.split(parts[f"{gate_up}{end}.{tile}"], 2, axis=axis) for tile in range(2)]
            np.testing.assert_array_equal(np.concatenate([half[0] for half in halves], axis=axis), gate)
            np.testing.assert_array_equal(np.concatenate([half[1] for half in halves], axis=axis), up)
        joined = np.concatenate([parts[f"{down}.codes.{tile}"] for tile in range(2)], axis=2)
        np.testing.assert_array_equal(joined, whole[f"{down}.codes"])
        for name in (f"{down}.gains", f"{down}.input_scale", f"{gate_up}.input_scale"):
            np.testing.assert_array_equal(parts[name], whole[name])


@pytest.mark.parametrize(("form", "weights"), [("scout", "int4"), ("maverick", "fp16"), ("topk2", "int4")])
def test_tiles_answer_as_the_whole_does(
    tiny_checkpoint: Checkpoint, tiny_bundle: TinyBundle, tmp_path: Path, form: str, weights: str
) -> None:
    """To float16's 11 bits: a tile's answers are rounded, their sum is float32."""
    whole = score(open_bundle(tiny_bundle(form, "tensorrt-rtx", weights)))
    got = score(tiled(tiny_checkpoint(form), tmp_path / "out", weights))
    assert np.abs(got - whole).max() < 2e-3 * np.abs(whole).max()
    assert (got != whole).any()


def test_tiles_of_fp8_answer_as_the_whole_does(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """One layer: what differs by float16's 11 bits is rounded to the same FP8 number after it, or rarely to the next one,
    6 to 12 % of one input away. No difference at all is seen."""
    layer = Path(f"{tiny_checkpoint('topk2')}?layers=0-0")
    whole, got = (score(tiled(layer, tmp_path / f"{n}", "fp8", n)) for n in (1, 2))
    assert np.abs(got - whole).max() < 2e-2 * np.abs(whole).max()


def test_an_engine_writes_one_tile_at_a_time(tmp_path: Path) -> None:
    """The demo in four tiles: a kernel for each that writes a quarter of what one kernel writes for the whole.

    Of a prompt the last layer has one row, for which nothing is written out.
    """
    pytest.importorskip("tensorrt_rtx")
    recipe = Recipe(target="tensorrt-rtx", weights="int4", group_size=64, expert_tiles=4)
    compile(DEMO, tmp_path / "out", recipe)
    bundle = build_engines(tmp_path / "out", gpu="8.9")
    (engine,) = bundle.manifest.engines
    about = json.loads(bundle.path(engine.sidecar).read_text())
    assert about["weight_bytes"] < 1.15 * about["expected_weight_bytes"]
    for profile in about["profiles"]:
        by_layer: dict[str, list[int]] = {}
        for kernel in profile["unfused_weights"]:
            layer = kernel["layers"][0].partition(".feed_forward")[0]
            half = [tensor["known_bytes"] for tensor in kernel["writes"] if tensor["type"] == "half"]
            by_layer.setdefault(layer, []).append(sum(half))
        layers = range(4 - (profile["name"] == "prefill"))
        assert by_layer == {f"layers.{i}": [3 * 256 * 64 * 2] * 4 for i in layers}


def test_tiles_that_do_not_fit_are_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="64 columns do not divide into that many tiles of whole groups of 32"):
        tiled(tiny_checkpoint("scout"), tmp_path / "out", tiles=4)
    with pytest.raises(InputError, match="expert_tiles is -1"):
        Recipe(target="tensorrt-rtx", weights="fp16", expert_tiles=-1)
    assert not (tmp_path / "out").exists()
