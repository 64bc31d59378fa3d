"""Quantized bundles against PyTorch on the same dequantized weights, so that only the kernels' arithmetic is in question."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime as ort
import pytest
import torch

from corral.graphs import compile
from corral.model.checkpoint.open import open_checkpoint
from corral.model.checkpoint.reference import load_reference
from corral.model.text import Llama4Text
from corral.runtime import LLM
from corral.spec.bundle import open_bundle
from corral.spec.kv_layout import kv_layouts
from corral.spec.recipe import Recipe

GROUP = 32
Bundle = Callable[[str, str, str], Path]
Checkpoint = Callable[[str], Path]
Run = Callable[[list[str], dict[str, np.ndarray]], Any]


def round_to_nearest(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    """[outputs, inputs] -> what symmetric round to nearest in groups of 32 inputs makes of it: a second implementation."""
    limit = 2 ** (bits - 1) - 1
    groups = matrix.double().unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / limit).float().double()
    return ((groups / scale).round().clamp(-limit, limit) * scale).flatten(-2).float()


def quantized_reference(directory: Path, bits: int) -> Llama4Text:
    model = load_reference(open_checkpoint(directory))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts.gate_up_proj" in name or "experts.down_proj" in name:
                parameter.copy_(round_to_nearest(parameter.transpose(1, 2), bits).transpose(1, 2))
            elif parameter.dim() == 2 and "router" not in name and "embed" not in name:
                parameter.copy_(round_to_nearest(parameter, bits))
    return model


def first_chunk_logits(run: Run, bundle: Path, model: Llama4Text, ids: np.ndarray) -> np.ndarray:
    """Logits of one graph call on `ids`, at most a chunk."""
    manifest = open_bundle(bundle).manifest
    count = len(ids)
    embeddings = model.embed_tokens.weight.detach().numpy()[ids][None]
    feeds = {"embeddings": embeddings, "positions": np.arange(count)[None], "logit_rows": np.arange(count)[None]}
    for layout in kv_layouts(manifest.model):
        feeds[f"past_length.{layout.kv_class}"] = np.zeros(1, np.int64)
        for layer in layout.layers:
            for part in ("key", "value"):
                shape = (1, layout.num_heads, layout.capacity(64), layout.head_dim)
                feeds[f"past_{part}.{layer}"] = np.zeros(shape, np.float32)
    return run(["logits"], feeds)[0][0]


def onnxruntime_in_float(path: Path) -> Run:
    """The bundle's graph with its quantized kernels told to compute in float32 instead of with int8 activations."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    options = ort.SessionOptions()
    options.log_severity_level = 3
    changed = path.with_name(f"float-{path.name}")
    onnx.save(model, changed)
    try:
        session = ort.InferenceSession(str(changed), options, providers=["CPUExecutionProvider"])
    finally:
        changed.unlink()
    return lambda names, feeds: session.run(names, feeds)


@pytest.mark.parametrize(
    ("form", "weights"),
    # QMoE has no float32 path for 8 bits (its accuracy levels all round activations to int8): the dense form stands for int8.
    [("scout", "int4"), ("maverick", "int4"), ("guard", "int4"), ("topk2", "int4"), ("guard", "int8")],
)
def test_cpu_kernels_compute_the_dequantized_model(
    tiny_checkpoint: Checkpoint, tiny_bundle: Bundle, form: str, weights: str
) -> None:
    model = quantized_reference(tiny_checkpoint(form), {"int8": 8, "int4": 4}[weights])
    bundle = tiny_bundle(form, "cpu", weights)
    ids = np.random.default_rng(4).integers(0, 256, 16)
    with torch.no_grad():
        want = model.logits(torch.tensor(ids)[None])[0].numpy()
    got = first_chunk_logits(onnxruntime_in_float(bundle / "decoder.onnx"), bundle, model, ids)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize(
    ("published", "weights"), [("fp8 per output", "fp32"), ("int4 g32", "int4"), ("int4 g32 asymmetric", "int4")]
)
def test_published_weights_compute_what_their_authors_mean(
    published_checkpoint: Callable[..., tuple[Path, Path]], tmp_path: Path, published: str, weights: str, target: str
) -> None:
    """Against the numbers that the library dequantizes. Every matrix but the routers is published quantized."""
    quantized, plain = published_checkpoint("two_layers", published, "^(?!.*router)")
    asymmetric = "asymmetric" in published
    recipe = Recipe(target=target, weights=weights, group_size=GROUP, asymmetric=asymmetric)
    bundle = compile(quantized, tmp_path / "out", recipe)
    assert {row.stored for row in bundle.manifest.coverage if weights == "int4" and row.published} <= {published}
    model = load_reference(open_checkpoint(plain))
    ids = np.random.default_rng(7).integers(0, 256, 16)
    with torch.no_grad():
        want = model.logits(torch.tensor(ids)[None])[0].numpy()
    path = tmp_path / "out" / "decoder.onnx"
    if target == "portable":
        evaluator = onnx.reference.ReferenceEvaluator(onnx.load(path))
        got = first_chunk_logits(lambda names, feeds: evaluator.run(names, feeds), path.parent, model, ids)
    else:
        got = first_chunk_logits(onnxruntime_in_float(path), path.parent, model, ids)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize(
    ("form", "weights"), [("scout", "fp32"), ("scout", "int4"), ("maverick", "int8"), ("topk2", "fp32")]
)
def test_portable_graphs_run_in_onnx_reference_evaluator(
    tiny_checkpoint: Checkpoint, tiny_bundle: Bundle, form: str, weights: str
) -> None:
    """Through the fallback bodies, and blocked DequantizeLinear where quantized."""
    bits = {"fp32": None, "int8": 8, "int4": 4}[weights]
    directory = tiny_checkpoint(form)
    model = quantized_reference(directory, bits) if bits else load_reference(open_checkpoint(directory))
    bundle = tiny_bundle(form, "portable", weights)
    ids = np.random.default_rng(5).integers(0, 256, 16)
    with torch.no_grad():
        want = model.logits(torch.tensor(ids)[None])[0].numpy()
    evaluator = onnx.reference.ReferenceEvaluator(onnx.load(bundle / "decoder.onnx"))
    got = first_chunk_logits(lambda names, feeds: evaluator.run(names, feeds), bundle, model, ids)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize(("form", "weights"), [("scout", "int4"), ("maverick", "int8"), ("guard", "int4")])
def test_portable_bundles_compute_in_float(
    tiny_checkpoint: Checkpoint, tiny_bundle: Bundle, form: str, weights: str
) -> None:
    model = quantized_reference(tiny_checkpoint(form), {"int8": 8, "int4": 4}[weights])
    ids = np.random.default_rng(8).integers(0, 256, 40)
    with torch.no_grad():
        want = model.logits(torch.tensor(ids)[None])[0].numpy()
    got = LLM(tiny_bundle(form, "portable", weights)).score(ids)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("form", ["scout", "maverick", "topk2"])
def test_a_bundle_larger_than_memory_computes_in_float(
    tiny_checkpoint: Checkpoint, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Weights that stay in the file are not packed for the int8 kernels; over a chunk boundary."""
    monkeypatch.setattr("corral.runtime.onnxruntime_session.usable_memory", lambda: 0)
    model = quantized_reference(tiny_checkpoint(form), 4)
    ids = np.random.default_rng(7).integers(0, 256, 40)
    with torch.no_grad():
        want = model.logits(torch.tensor(ids)[None])[0].numpy()
    got = LLM(tiny_bundle(form, "cpu", "int4")).score(ids)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("form", ["scout", "maverick", "guard", "topk2"])
def test_the_kernels_int8_activations_cost_little(
    tiny_checkpoint: Checkpoint, tiny_bundle: Bundle, form: str, weights: str
) -> None:
    """As shipped (accuracy level 4): nearer to the dequantized model than 5 % of scale in the mean, for one chunk."""
    model = quantized_reference(tiny_checkpoint(form), {"int8": 8, "int4": 4}[weights])
    bundle = tiny_bundle(form, "cpu", weights)
    ids = np.random.default_rng(6).integers(0, 256, 16)
    with torch.no_grad():
        want = model.logits(torch.tensor(ids)[None])[0].numpy()
    session = ort.InferenceSession(str(bundle / "decoder.onnx"), providers=["CPUExecutionProvider"])
    got = first_chunk_logits(lambda names, feeds: session.run(names, feeds), bundle, model, ids)
    assert np.abs(got - want).mean() < 0.05 * np.abs(want).max()
