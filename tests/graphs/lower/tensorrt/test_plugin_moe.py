"""Experts as plugins: the graph that TensorRT is given, in ONNX's reference evaluator, its plugins by their CUDA sources.

The sources are compiled for the CPU, as docs/kernels.md says. So all is run but NVIDIA's builder, layers and tensor cores.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx.reference.op_run import OpRun
from safetensors.torch import load_file, save_file

from corral.cli.main import main
from corral.graphs import compile
from corral.graphs.engine import build
from corral.graphs.engine.kernels.launch import buffers, tiling_for
from corral.graphs.engine.plugins.moe import NAMESPACE, PLUGINS, Plugin
from corral.graphs.engine.worker import EngineJob
from corral.model.checkpoint.open import open_checkpoint
from corral.model.checkpoint.reference import load_reference
from corral.model.text import Experts, Llama4Text
from corral.runtime import LLM
from corral.runtime.session import Session
from corral.spec.bundle import Bundle
from corral.spec.errors import CheckFailed
from corral.spec.recipe import Recipe
from corral.spec.rule import Rule
from corral.validate.engine_graph import as_ready

TOLERANCE = 4e-3  # of the logits' scale, as in test_lowering.py: float16 has 11 bits
Checkpoint = Callable[[str], Path]
RunOnCpu = Callable[..., None]


def as_operator(plugin: Plugin, run_on_cpu: RunOnCpu) -> type[OpRun]:
    """A plugin for the reference evaluator: what its node says is launched, on buffers of the types and sizes of the plan."""

    def run(self: OpRun, *inputs: np.ndarray, plugin_namespace: str, plugin_version: str, **sizes: int) -> Any:
        assert (plugin_namespace, plugin_version) == (NAMESPACE, "1") and sizes.keys() == set(plugin.attributes)
        shape = plugin.shape(sizes)
        names = plugin.tensors.inputs
        tokens = len(inputs[0]) // (shape.top_k if names[0] == "h" else 1)
        table = buffers(shape, tokens)
        made = dict(zip(names, inputs, strict=True))
        for name, array in made.items():
            dtype, extent = table[name]
            assert array.shape == extent and array.dtype == ("int8" if dtype == "uint8" else dtype), name
        outputs = plugin.tensors.outputs
        made |= {name: np.zeros(table[name][1], table[name][0]) for name in outputs}
        run_on_cpu(plugin.launch(shape, tokens, tiling_for(shape, tokens), min), made)
        return tuple(made[name] for name in outputs)

    return type(plugin.name, (OpRun,), {"op_domain": NAMESPACE, "_run": run})


def compiled(checkpoint: Path, out: Path, weights: str, **more: Any) -> Bundle:
    """For `tensorrt`, as if it had its engine: its graph is run in the engine's place."""
    recipe = Recipe(target="tensorrt", weights=weights, group_size=32, calibration_tokens=1024, **more)
    bundle = compile(checkpoint, out, recipe)
    assert bundle.manifest.stage == "lowered"
    return as_ready(bundle)


def graph_of(bundle: Bundle) -> onnx.GraphProto:
    return onnx.load(bundle.path(bundle.manifest.graphs[0].path), load_external_data=False).graph


def in_groups(matrix: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs] -> what symmetric int4 in groups of 32 inputs makes of it."""
    groups = matrix.unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return ((groups / scale).round() * scale).flatten(-2)


def per_output(matrix: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs] -> what FP8 with a scale an output makes of it."""
    scale = matrix.abs().amax(-1, keepdim=True) / 448
    return (matrix / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@cache
def reference(directory: Path, experts: str) -> Llama4Text:
    """The model with its experts rounded, and nothing else."""
    model = load_reference(open_checkpoint(directory))
    rounded = {"int4": in_groups, "fp8": per_output, "fp16": lambda matrix: matrix}[experts]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Experts):
                for weight in (module.gate_up_proj, module.down_proj):
                    weight.copy_(rounded(weight.transpose(1, 2)).transpose(1, 2))
    return model


@pytest.mark.parametrize(
    ("form", "experts"),
    [("scout", "int4"), ("scout", "fp8"), ("topk2", "int4"), ("topk2", "fp16"), ("maverick", "fp16")],
)
def test_the_graph_with_plugins_computes_what_pytorch_computes(
    form: str,
    experts: str,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    run_on_cpu: RunOnCpu,
    evaluator: Callable[..., Session],
    clearly_routed: Callable[[Llama4Text, int], list[int]],
) -> None:
    """A prefill over a chunk boundary, and one token alone."""
    rules = (Rule(matrices="*.experts.*", weights=experts),) if experts != "fp16" else ()
    bundle = compiled(tiny_checkpoint(form), tmp_path / "out", "fp16", rules=rules)
    layers = sum(layer.moe for layer in bundle.manifest.model.layers)
    called = [node.op_type for node in graph_of(bundle).node if node.domain == NAMESPACE]
    assert called == ["moe_route", f"moe_gate_up_{experts}", f"moe_down_{experts}"] * layers
    model = reference(tiny_checkpoint(form), experts)
    ids = clearly_routed(model, 24)
    operators = [as_operator(plugin, run_on_cpu) for plugin in PLUGINS]
    with torch.no_grad():
        want = model.logits(torch.tensor([ids]))[0].numpy()
    got = LLM(bundle, session=evaluator(bundle, operators), max_context=64).score(ids)
    assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()
    llm = LLM(bundle, session=evaluator(bundle, operators), max_context=64)
    assert np.abs(llm.score(ids[:1]) - want[:1]).max() < TOLERANCE * np.abs(want).max()


def initializers(bundle: Bundle) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in graph_of(bundle).initializer}


@pytest.mark.parametrize("weights", ["int4", "fp8", "fp16"])
def test_no_expert_is_stored_as_float_or_twice(weights: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As many bytes as the bits say, in the coverage table and in the graph, and none behind a DequantizeLinear."""
    bundle = compiled(tiny_checkpoint("scout"), tmp_path / "out", weights)
    (experts,) = (row for row in bundle.manifest.coverage if row.kind == "experts")
    numbers, outputs = 5 * 8 * 3 * 64 * 64, 5 * 8 * 3 * 64
    assert experts.stored == {"int4": "int4 g32", "fp8": "fp8 per output", "fp16": "float16"}[weights]
    scales = {"int4": numbers // 32 * 2, "fp8": outputs * 4, "fp16": 0}[weights]
    assert experts.bytes == numbers * {"int4": 4, "fp8": 8, "fp16": 16}[weights] // 8 + scales
    stored = {name: tensor for name, tensor in initializers(bundle).items() if ".experts." in name}
    lengths = [int(place.value) for t in stored.values() for place in t.external_data if place.key == "length"]
    assert sum(lengths) == experts.bytes
    (readers,) = {frozenset(n.domain for n in graph_of(bundle).node if name in n.input) for name in stored}
    assert readers == {NAMESPACE}


@pytest.mark.parametrize(
    ("form", "more"), [("scout", {"expert_tiles": 1}), ("narrow", {}), ("guard", {})], ids=["asked", "narrow", "dense"]
)
def test_what_plugins_do_not_cover_is_lowered_without_them(
    form: str, more: dict[str, Any], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("scout" if form == "narrow" else form)
    if form == "narrow":  # 32 columns are no whole tile of the kernels
        checkpoint = narrowed(checkpoint, tmp_path / "narrow")
    graph = graph_of(compiled(checkpoint, tmp_path / "out", "int4", **more))
    assert {node.domain for node in graph.node} == {""}


def narrowed(checkpoint: Path, out: Path) -> Path:
    """The checkpoint with experts of half their width."""
    shutil.copytree(checkpoint, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        if "shared_expert.down" in name:
            tensors[name] = tensor[:, :32].contiguous()
        elif "shared_expert" in name or "experts.down" in name:
            tensors[name] = tensor.narrow(-2, 0, 32).contiguous()
        elif "experts.gate_up" in name:
            tensors[name] = tensor.narrow(-1, 0, 64).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_a_module_without_plugins_is_refused_with_what_to_do(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    bundle = compiled(tiny_checkpoint("scout"), tmp_path / "out", "int4")
    done = CliRunner().invoke(main, ["build", str(bundle.directory), "--gpu", "8.9", "--target", "tensorrt-rtx"])
    assert done.exit_code == 2
    words = " ".join(done.output.split())
    assert "corral's own kernels (moe_route, moe_gate_up_int4, moe_down_int4)" in words
    assert "tensorrt_rtx takes no kernels of others. Compile the checkpoint with --target tensorrt-rtx" in words
    assert not list(bundle.directory.glob("*.engine*"))


def test_a_build_compiles_plugins_for_its_gpu(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = compiled(tiny_checkpoint("scout"), tmp_path / "out", "int4")
    seen: list[EngineJob] = []

    def run(job: EngineJob, directory: Path) -> Any:
        seen.append(job)
        raise CheckFailed("enough")

    monkeypatch.setattr(build, "_run", run)
    settings = build.EngineSettings(module="tensorrt", capabilities=("9.0",), profiles=())
    with pytest.raises(CheckFailed, match="enough"):
        build.build_engine(bundle.directory / "decoder.onnx", "decoder.engine", settings)
    assert seen[0].plugins == "compute_90"
