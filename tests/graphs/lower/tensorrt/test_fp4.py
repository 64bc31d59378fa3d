"""NVFP4: the graph that TensorRT is given, in ONNX's reference evaluator (ONNX Runtime has no FP4), against PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

from corral.graphs import compile
from corral.graphs.compiler import lower
from corral.model.checkpoint.open import open_checkpoint
from corral.model.checkpoint.reference import load_reference
from corral.model.text import Llama4Text
from corral.runtime import LLM
from corral.runtime.session import Session
from corral.spec.errors import InputError
from corral.spec.quant_scheme import SCHEMES
from corral.spec.recipe import Recipe
from corral.spec.rule import Rule
from corral.validate.engine_graph import as_ready

TOLERANCE = 4e-3  # of the logits' scale, as in test_lowering.py: float16 has 11 bits
Checkpoint = Callable[[str], Path]


def nvfp4(matrix: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs] -> its values in NVFP4, by ml_dtypes' casts, an output's largest block scaled by 256."""
    scale = matrix.abs().amax(-1, keepdim=True) / (6 * 256)
    groups = (matrix / scale).unflatten(-1, (-1, 16)).numpy()
    blocks = np.abs(groups).max(-1, keepdims=True) / np.float32(6)
    blocks = np.maximum(blocks, 2.0**-9).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = np.clip(groups / blocks, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return torch.from_numpy(codes * blocks).flatten(-2) * scale


@cache
def reference(directory: Path) -> Llama4Text:
    model = load_reference(open_checkpoint(directory))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts.gate_up_proj" in name or "experts.down_proj" in name:
                parameter.copy_(nvfp4(parameter.transpose(1, 2)).transpose(1, 2))
            elif parameter.dim() == 2 and "router" not in name and "embed" not in name:
                parameter.copy_(nvfp4(parameter))
    return model


@pytest.mark.parametrize(("form", "tiles"), [("scout", 1), ("topk2", 1), ("topk2", 2), ("guard", 1)])
def test_the_graph_computes_what_pytorch_computes_with_the_same_numbers(
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    evaluator: Callable[..., Session],
    clearly_routed: Callable[[Llama4Text, int], list[int]],
    form: str,
    tiles: int,
) -> None:
    """Joined matrices, gathered experts, whole or in tiles; a prefill over a chunk boundary."""
    recipe = Recipe(target="tensorrt-rtx", weights="nvfp4", max_context=64, expert_tiles=tiles, group_size=32)
    bundle = as_ready(compile(tiny_checkpoint(form), tmp_path / "out", recipe))
    model = reference(tiny_checkpoint(form))
    ids = clearly_routed(model, 24)
    with torch.no_grad():
        want = model.logits(torch.tensor([ids]))[0].numpy()
    got = LLM(bundle, session=evaluator(bundle), max_context=64).score(ids)
    assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()


def test_every_matrix_is_stored_in_four_bits_with_a_scale_for_sixteen(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    bundle = compile(tiny_checkpoint("scout"), tmp_path / "out", Recipe(target="tensorrt-rtx", weights="nvfp4"))
    graph = onnx.load(tmp_path / "out" / "decoder.onnx", load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    codes = {name for name in stored if name.endswith(".codes")}
    assert {stored[name].data_type for name in codes} == {onnx.TensorProto.FLOAT4E2M1}
    for name in codes:
        groups = stored[name.replace(".codes", ".groups")]
        assert groups.data_type == onnx.TensorProto.FLOAT8E4M3FN
        *front, inputs = stored[name].dims
        assert list(groups.dims) == [*front, inputs // 16]
    rows = {row.kind: row for row in bundle.manifest.coverage}
    assert {rows[kind].stored for kind in ("experts", "shared expert", "attention", "head")} == {"nvfp4"}
    experts = rows["experts"]
    outputs = 5 * 8 * 3 * 64  # of 64 inputs each, with a float16 gain
    assert experts.bytes == experts.parameters // 2 + experts.parameters // 16 + 2 * outputs


@pytest.mark.parametrize(("weights", "method"), [("nvfp4", "rtn"), ("nvfp4", "rtn-mse"), ("mxfp4", "rtn-mse")])
def test_portable_emulates_with_the_values_that_codes_stand_for(
    tiny_checkpoint: Checkpoint, tmp_path: Path, weights: str, method: str
) -> None:
    """The same numbers as float32 weights, and the coverage table says so."""
    recipe = Recipe(target="portable", weights=weights, method=method)
    bundle = compile(tiny_checkpoint("scout"), tmp_path / "out", recipe)
    words = weights + (f" {method}" if method != "rtn" else "") + " (emulated in float32)"
    assert {row.stored for row in bundle.manifest.coverage if row.kind in ("experts", "attention", "head")} == {words}
    if (weights, method) != ("nvfp4", "rtn"):
        return
    ids = list(range(24))
    with torch.no_grad():
        want = reference(tiny_checkpoint("scout")).logits(torch.tensor([ids]))[0].numpy()
    got = LLM(bundle).score(ids)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_mxfp4_is_refused_for_engines_with_the_parsers_words() -> None:
    for target in ("tensorrt-rtx", "tensorrt"):
        with pytest.raises(InputError, match=r"does not take mxfp4 weights.*E8M0.*cannot be imported.*Use nvfp4"):
            Recipe(target=target, weights="mxfp4")


def test_caches_in_fp8_are_refused_for_engines_with_the_builders_words() -> None:
    with pytest.raises(InputError, match=r'kv "fp8" is not known.*cache has type FP8 but must have.*Use --kv float'):
        Recipe(target="tensorrt-rtx", weights="fp8", kv="fp8")


def test_gpus_without_fp4_are_refused() -> None:
    with pytest.raises(InputError, match=r"8\.9 has no nvfp4 weights.*nvfp4 needs one of 12\.0"):
        Recipe(target="tensorrt-rtx", weights="nvfp4", gpu="rtx4090")


def test_methods_that_make_no_fp4_are_refused_and_a_rule_without_one_takes_the_best() -> None:
    with pytest.raises(InputError, match=r"method gptq does not make nvfp4 weights; expected rtn or rtn-mse"):
        Recipe(target="tensorrt-rtx", weights="nvfp4", method="gptq")
    rules = (Rule(matrices="*.experts.*", weights="nvfp4"),)
    mixed = Recipe(target="tensorrt-rtx", weights="int4", method="gptq", rules=rules)
    assert mixed.of("layers.0.feed_forward.experts.down_proj").method == "rtn-mse"


def test_inputs_that_blocks_do_not_divide_are_refused(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All matrices of the tiny checkpoints have 64 or 128 inputs: larger blocks stand for a narrower matrix."""
    monkeypatch.setitem(SCHEMES, "nvfp4", dataclasses.replace(SCHEMES["nvfp4"], block_size=48))
    with pytest.raises(InputError, match=r"nvfp4 has blocks of 48, which do not divide the 64 inputs of layers\.0\."):
        lower(open_checkpoint(tiny_checkpoint("guard")), Recipe(target="portable", weights="nvfp4"))
