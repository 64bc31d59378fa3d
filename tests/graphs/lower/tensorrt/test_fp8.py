"""FP8: the quantizer against torch's own type, and the graph that TensorRT is given against PyTorch that rounds likewise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corral.graphs import compile
from corral.graphs.quantize.calibrate import activation_ranges
from corral.model.checkpoint.open import open_checkpoint
from corral.model.checkpoint.reference import load_reference
from corral.model.text import Experts, Llama4Text
from corral.runtime import LLM
from corral.runtime.onnxruntime_graph import OnnxRuntimeGraph
from corral.runtime.onnxruntime_session import OnnxRuntimeSession
from corral.spec.bundle import Bundle, open_bundle
from corral.spec.errors import EnvironmentProblem, InputError
from corral.spec.recipe import Recipe

FP8 = Recipe(target="tensorrt-rtx", weights="fp8", max_context=128)
Checkpoint = Callable[[str], Path]


def rounded(x: Tensor, scale: float | Tensor) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def per_output(matrix: Tensor) -> Tensor:
    """[outputs, inputs], each output scaled by its own largest magnitude."""
    return rounded(matrix, matrix.abs().amax(-1, keepdim=True) / 448)


def fp8_reference(directory: Path) -> Llama4Text:
    """The model with weights and matrix inputs rounded to FP8, in float32 otherwise."""
    checkpoint = open_checkpoint(directory)
    model, ranges = load_reference(checkpoint), activation_ranges(checkpoint, FP8)
    scale = {name: float(np.float16(largest / 448)) for name, largest in ranges.items()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("router"):
            module.weight.copy_(per_output(module.weight))
            module.register_forward_pre_hook(lambda _, x, s=scale[name]: (rounded(x[0], s),))
        elif isinstance(module, Experts):
            for weight in (module.gate_up_proj, module.down_proj):
                weight.copy_(per_output(weight.transpose(1, 2)).transpose(1, 2))
            _round_inputs(module, scale[f"{name}.input"], scale[f"{name}.activated"])
    return model


def _round_inputs(experts: Any, first: float, second: float) -> None:
    activated = experts.activated
    experts.activated = lambda e, x: rounded(activated(e, rounded(x, first)), second)


class BasicGraph(OnnxRuntimeGraph):
    """Higher levels of optimization make graphs with FP8 invalid in ONNX Runtime 1.31."""

    def _open(self, provider: str, threads: int, mapped: bool) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        return self._ort.InferenceSession(self._where, options, providers=["CPUExecutionProvider"])


class BasicSession(OnnxRuntimeSession):
    """The bundle's graphs, run so."""

    def __init__(self, bundle: Bundle) -> None:
        self._graphs = [
            BasicGraph(bundle, record, provider="cpu", threads=1, mapped=False) for record in bundle.manifest.graphs
        ]


@pytest.mark.parametrize("form", ["scout", "topk2", "guard"])
def test_the_graph_computes_what_pytorch_computes_with_the_same_rounding(
    tiny_checkpoint: Checkpoint, tmp_path: Path, form: str
) -> None:
    """As near as rounding lets two computations be that differ in their last bits.

    Values within float16's error of a boundary, 1 to 2 % of them, round to another FP8 number, a step of 6 to 12 % away:
    after one layer that is 0.4 of the quantization's own error. 0.39 to 0.64 is seen; a wrong scale, or errors that had
    nothing to do with each other, would be at least 1.
    """
    compile(tiny_checkpoint(form), tmp_path / "out", FP8)
    bundle = open_bundle(tmp_path / "out")
    bundle = Bundle(bundle.directory, dataclasses.replace(bundle.manifest, stage="ready"))
    ids = np.random.default_rng(1).integers(0, 256, 37).tolist()
    got = LLM(bundle, session=BasicSession(bundle), max_context=128).score(ids)
    with torch.no_grad():
        want = fp8_reference(tiny_checkpoint(form)).logits(torch.tensor([ids]))[0].numpy()
        unrounded = load_reference(open_checkpoint(tiny_checkpoint(form))).logits(torch.tensor([ids]))[0].numpy()
    error, effect = np.abs(got - want).mean(), np.abs(want - unrounded).mean()
    assert error < 0.8 * effect
    assert np.abs(got - unrounded).mean() < 1.25 * effect


def test_every_matrix_has_a_range_and_experts_have_two(tiny_checkpoint: Checkpoint) -> None:
    ranges = activation_ranges(open_checkpoint(tiny_checkpoint("maverick")), FP8)
    for layer in range(5):
        names = [f"layers.{layer}.self_attn.{x}_proj" for x in "qkvo"]
        mlp = f"layers.{layer}.feed_forward"
        names += [f"{mlp}.experts.input", f"{mlp}.experts.activated"] if layer % 2 else [f"{mlp}.down_proj"]
        assert all(ranges[name] > 0 for name in names)
    assert activation_ranges(open_checkpoint(tiny_checkpoint("maverick")), Recipe()) == {}


def test_calibration_that_cannot_be_is_refused(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corral.graphs.quantize import calibrate

    with pytest.raises(InputError, match=r"has no tokenizer\.json, and FP8 is calibrated on a text"):
        activation_ranges(open_checkpoint(Path("synthetic:debug")), FP8)
    monkeypatch.setattr(calibrate, "usable_memory", lambda: 1000)
    with pytest.raises(EnvironmentProblem, match="runs the whole model in float32"):
        compile(tiny_checkpoint("guard"), tmp_path / "out", FP8)
    assert not (tmp_path / "out").exists()
