"""Bundles for corral's CPU kernels, through the runtime, against PyTorch with the same weights and int8 activations."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corral.graphs import compile
from corral.graphs.stages import export_stage, lower_stage, quantize_stage
from corral.model.checkpoint.open import open_checkpoint
from corral.model.checkpoint.reference import load_reference
from corral.model.text import Experts, Llama4Text
from corral.runtime import LLM, SamplingParams
from corral.spec.bundle import open_bundle
from corral.spec.cpu_ops import VERSION
from corral.spec.errors import EnvironmentProblem, InputError
from corral.spec.recipe import Recipe
from corral.spec.rule import Rule

pytestmark = pytest.mark.usefixtures("cpu_kernels")

GROUP = 32
FORMS = ("scout", "maverick", "guard", "topk2")
RECIPE = Recipe(target="cpu", weights="int4", group_size=GROUP, kernels="corral")
Bundle = Callable[..., Path]
Checkpoint = Callable[[str], Path]


def dequantized(matrix: Tensor, bits: int = 4, asymmetric: bool = False) -> Tensor:
    """[outputs, inputs] -> what codes by the float32 scale, and the scale that is stored in fp16, make of it."""
    groups, largest = matrix.double().unflatten(-1, (-1, GROUP)), 2 ** (bits - 1) - 1
    if asymmetric:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).float()
        zero = (-low / scale.double()).round()
        codes = (groups / scale.double()).round().clamp(-zero, 2**bits - 1 - zero)
        return (codes * scale.half().double()).flatten(-2).float()
    scale = (groups.abs().amax(-1, keepdim=True) / largest).float()
    codes = (groups / scale.double()).round().clamp(-largest, largest)
    return (codes * scale.half().double()).flatten(-2).float()


def rounded(x: Tensor) -> Tensor:
    """x with int8 codes and a scale for each group, as the kernels see it."""
    groups = x.unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return ((groups * (127 / largest)).round() * (largest / 127)).flatten(-2)


class RoundedExperts(Experts):
    """Experts whose inputs are rounded before each product."""

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        gate, up = (rounded(x) @ self.gate_up_proj[expert]).chunk(2, dim=-1)
        return rounded(F.silu(gate) * up) @ self.down_proj[expert]


def reference(
    directory: Path,
    bits_of: Callable[[str], int] = lambda name: 4,
    asymmetric: Callable[[str], bool] = lambda name: False,
) -> Llama4Text:
    """The model with the kernels' arithmetic, but for the order of sums."""
    model = load_reference(open_checkpoint(directory))
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Experts):
                module.__class__ = RoundedExperts
                for own in ("gate_up_proj", "down_proj"):
                    parameter, how = getattr(module, own), (bits_of(f"{name}.{own}"), asymmetric(f"{name}.{own}"))
                    parameter.copy_(dequantized(parameter.transpose(1, 2), *how).transpose(1, 2))
            elif isinstance(module, nn.Linear) and "router" not in name:
                module.weight.copy_(dequantized(module.weight, bits_of(name), asymmetric(name)))
                module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    return model


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_the_stored_weights(tiny_checkpoint: Checkpoint, tiny_bundle: Bundle, form: str) -> None:
    """Over three chunks. Exact, but where a value on the border of two int8 codes takes the other one."""
    ids = np.random.default_rng(3).integers(0, 256, 40)
    with torch.no_grad():
        want = reference(tiny_checkpoint(form)).logits(torch.tensor(ids)[None])[0].numpy()
    got = LLM(tiny_bundle(form, "cpu", "int4", "corral")).score(ids)
    error = np.abs(got - want) / np.abs(want).max()
    assert error.max(axis=-1).min() < 2e-6  # a row that no such value came into
    assert error.mean() < 1e-3
    assert error.max() < 2e-2


def test_groups_may_have_zero_points_and_some_matrices_none(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Experts of which only one matrix is asymmetric, a feed-forward likewise, and the rest of int2 and int4."""
    symmetric = ("layers.0.*.gate_up_proj", "layers.1.*.down_proj", "layers.2.*.shared_expert.down_proj", "lm_head")
    rules = [Rule(matrices=pattern, asymmetric=False) for pattern in symmetric]
    rules.append(Rule(matrices="layers.3.*", weights="int2"))
    bundle = compile(
        tiny_checkpoint("scout"), tmp_path / "out", dataclasses.replace(RECIPE, rules=tuple(rules), asymmetric=True)
    )
    stored = [(record.stored, record.bytes * 8 / record.parameters) for record in bundle.manifest.coverage]
    assert ("int4 g32 asymmetric", 4 + (16 + 4) / GROUP) in stored
    assert ("int2 g32 asymmetric", 2 + (16 + 4) / GROUP) in stored
    nodes = onnx.load(bundle.path("decoder.onnx"), load_external_data=False).graph.node
    assert not {"MatMulNBits", "QMoE", "DequantizeLinear"} & {node.op_type for node in nodes}
    model = reference(
        tiny_checkpoint("scout"),
        lambda name: 2 if fnmatchcase(name, "layers.3.*") else 4,
        lambda name: not any(fnmatchcase(name, pattern) for pattern in symmetric),
    )
    ids = np.random.default_rng(3).integers(0, 256, 40)
    with torch.no_grad():
        want = model.logits(torch.tensor(ids)[None])[0].numpy()
    error = np.abs(LLM(bundle).score(ids) - want) / np.abs(want).max()
    assert error.max(axis=-1).min() < 2e-6
    assert error.mean() < 1e-3


def test_matrices_may_have_other_bits_by_rules(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A whole module, one of three that would be merged, two of three that would be fused, experts, and the head."""
    bits = {
        "layers.0.self_attn.*": 8,
        "layers.1.self_attn.k_proj": 8,
        "layers.1.*.shared_expert.down_proj": 3,
        "layers.2.*.shared_expert.up_proj": 8,
        "layers.3.feed_forward.experts.down_proj": 3,
        "layers.1.feed_forward.experts.*": 8,
        "layers.2.feed_forward.experts.*": 2,
        "lm_head": 8,
    }
    rules = tuple(Rule(matrices=pattern, weights=f"int{n}") for pattern, n in bits.items())
    bundle = compile(tiny_checkpoint("scout"), tmp_path / "out", dataclasses.replace(RECIPE, rules=rules))
    nodes = [node.op_type for node in onnx.load(bundle.path("decoder.onnx"), load_external_data=False).graph.node]
    layers = bundle.manifest.model.num_layers
    assert nodes.count("TiledMatMul") == 2 * layers + 1 + 1 + 3  # one more for k alone, three for what is not fused
    assert "MatMulNBits" not in nodes
    # One shared expert has its gate and its up stored differently, and stays as it is.
    assert (nodes.count("TiledMoE"), nodes.count("TiledExperts"), nodes.count("TiledFeedForward")) == (layers - 1, 1, 0)
    ids = np.random.default_rng(3).integers(0, 256, 40)
    ruled = lambda name: next((n for pattern, n in bits.items() if fnmatchcase(name, pattern)), 4)  # noqa: E731
    model = reference(tiny_checkpoint("scout"), ruled)
    with torch.no_grad():
        want = model.logits(torch.tensor(ids)[None])[0].numpy()
    error = np.abs(LLM(bundle).score(ids) - want) / np.abs(want).max()
    assert error.max(axis=-1).min() < 2e-6
    assert error.mean() < 1e-3
    rule = Rule(matrices="layers.1.feed_forward.experts.down_proj", weights="fp32")
    with pytest.raises(
        InputError,
        match=r"layers\.1\.feed_forward\S* are not both quantized; .*, or use --kernels stock",
    ):
        compile(tiny_checkpoint("scout"), tmp_path / "experts", dataclasses.replace(RECIPE, rules=(rule,)))


def test_a_batch_gives_what_each_prompt_gives_alone(tiny_bundle: Bundle) -> None:
    llm = LLM(tiny_bundle("scout", "cpu", "int4", "corral"), threads=2)
    prompts = [list(np.random.default_rng(i).integers(0, 256, 3 + 7 * i)) for i in range(4)]
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    together = [completion.token_ids for completion in llm.generate(prompts, params)]
    assert together == [llm.generate([prompt], params)[0].token_ids for prompt in prompts]


@pytest.mark.parametrize("form", FORMS)
def test_every_large_matrix_goes_to_the_kernels(tiny_bundle: Bundle, form: str) -> None:
    bundle = open_bundle(tiny_bundle(form, "cpu", "int4", "corral"))
    config = bundle.manifest.model
    nodes = [node.op_type for node in onnx.load(bundle.path("decoder.onnx"), load_external_data=False).graph.node]
    layers, routed = config.num_layers, sum(layer.moe for layer in config.layers)
    assert nodes.count("TiledMatMul") == 2 * layers + 1  # q, k and v in one; o; the head
    assert nodes.count("TiledFeedForward") == layers - routed
    assert nodes.count("TiledMoE") == routed
    assert "TiledExperts" not in nodes
    assert nodes.count("MatMul") == routed  # routers
    assert not {"MatMulNBits", "QMoE", "DequantizeLinear", "Sigmoid"} & set(nodes)
    stored = {record.kind: record for record in bundle.manifest.coverage}
    assert stored["attention"].stored == "int4 g32"
    assert stored["attention"].bytes * 8 == stored["attention"].parameters * (4 + 16 / GROUP)  # fp16 scales
    assert bundle.manifest.requires == {"onnxruntime": "1.31", "corral_cpu_ops": str(VERSION)}


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_is_few_nodes(tiny_bundle: Bundle, form: str) -> None:
    """What a decode step of a small model waits for is the number of nodes."""
    bundle = open_bundle(tiny_bundle(form, "cpu", "int4", "corral"))
    nodes = onnx.load(bundle.path("decoder.onnx"), load_external_data=False).graph.node
    kinds = Counter(node.op_type for node in nodes)
    config = bundle.manifest.model
    routed = sum(layer.moe for layer in config.layers)
    assert kinds["Attention"] == config.num_layers
    assert kinds["AddRmsNorm"] == 2 * config.num_layers + 1
    assert not {"GroupQueryAttention", "RMSNormalization", "RotaryEmbedding", "Reshape", "Split"} & set(kinds)
    # qkv, attention, o, two norms with sums and the feed-forward; router, experts and their sum; positions and head.
    assert len(nodes) <= 6 * config.num_layers + 3 * routed + 22


@pytest.mark.parametrize(("kv", "error", "row"), [("int8", 0.05, 16 + 2), ("int4", 0.3, 8 + 2)])
def test_a_quantized_kv_cache_is_a_little_off_over_several_chunks(
    tiny_checkpoint: Checkpoint, tiny_bundle: Bundle, tmp_path: Path, kv: str, error: float, row: int
) -> None:
    """With random weights, where a rounding now and then sends a token to another expert; the operator's tests are exact."""
    bundle = compile(tiny_checkpoint("scout"), tmp_path / kv, dataclasses.replace(RECIPE, kv=kv))
    ids = np.random.default_rng(3).integers(0, 256, 100)  # six chunks
    want = LLM(tiny_bundle("scout", "cpu", "int4", "corral")).score(ids)
    llm = LLM(bundle)
    got = llm.score(ids)
    off = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 0 < off < error
    assert {(layout.dtype, layout.array_dtype, layout.row_items) for layout in bundle.manifest.kv} == {
        (kv, "uint8", row)
    }
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    prompts = [list(ids[:n]) for n in (3, 17, 40)]
    together = [completion.token_ids for completion in llm.generate(prompts, params)]
    assert together == [llm.generate([prompt], params)[0].token_ids for prompt in prompts]


def test_bytes_are_the_same_twice_and_by_stages(
    tiny_checkpoint: Checkpoint, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    whole = open_bundle(tiny_bundle("maverick", "cpu", "int4", "corral"))
    export_stage(tiny_checkpoint("maverick"), tmp_path / "exported")
    quantize_stage(tmp_path / "exported", tmp_path / "quantized", RECIPE)
    by_stages = lower_stage(tmp_path / "quantized", tmp_path / "lowered", RECIPE)
    assert {f.path: f.sha256 for f in whole.manifest.files} == {f.path: f.sha256 for f in by_stages.manifest.files}


def test_two_stages_give_the_logits_of_one(tiny_checkpoint: Checkpoint, tiny_bundle: Bundle, tmp_path: Path) -> None:
    compile(tiny_checkpoint("scout"), tmp_path / "staged", Recipe(**{**RECIPE.to_json(), "stages": 2}))
    ids = list(range(20))
    assert np.array_equal(
        LLM(tmp_path / "staged").score(ids), LLM(tiny_bundle("scout", "cpu", "int4", "corral")).score(ids)
    )


def test_a_bundle_is_refused_where_the_library_is_missing(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.kernels.library.PATH", tmp_path / "nothing.so")
    with pytest.raises(EnvironmentProblem, match=r"CPU kernels are not installed .* or compile .* `--kernels stock`"):
        LLM(tiny_bundle("scout", "cpu", "int4", "corral"))
    LLM(tiny_bundle("scout", "cpu", "int4"))


@pytest.mark.parametrize(
    ("needs", "remedy"),
    [
        ("1", "Compile the checkpoint again"),
        (str(VERSION + 1), "Install a newer corral"),
        ("99999999999999999999", "Install a newer corral"),
        ("latest", "Install a newer corral"),
        ("", "Install a newer corral"),
    ],
)
def test_a_bundle_for_another_library_is_refused(tiny_bundle: Bundle, tmp_path: Path, needs: str, remedy: str) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for path in tiny_bundle("scout", "cpu", "int4", "corral").iterdir():
        (bundle / path.name).hardlink_to(path)
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    manifest["requires"]["corral_cpu_ops"] = needs
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EnvironmentProblem, match=rf"have version {VERSION}; this bundle needs {needs}. {remedy}"):
        LLM(bundle)


def test_outputs_that_are_no_whole_tiles_are_refused_by_name(
    tiny_config: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = tiny_config("guard") | {"vocab_size": 300, "num_hidden_layers": 1, "no_rope_layers": [1]}
    Llama4ForCausalLM(Llama4TextConfig(**config)).save_pretrained(tmp_path / "odd")
    with pytest.raises(InputError, match=r"lm_head.weight has 300 outputs; .* multiples of 16. Use --kernels stock"):
        compile(tmp_path / "odd", tmp_path / "out", RECIPE)
    assert not (tmp_path / "out").exists()


def test_heads_that_are_no_whole_lanes_keep_onnx_runtimes_attention(
    tiny_config: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = tiny_config("guard") | {"head_dim": 8, "num_hidden_layers": 1, "no_rope_layers": [1]}
    Llama4ForCausalLM(Llama4TextConfig(**config)).save_pretrained(tmp_path / "narrow")
    bundle = compile(tmp_path / "narrow", tmp_path / "out", RECIPE)
    nodes = {node.op_type for node in onnx.load(bundle.path("decoder.onnx"), load_external_data=False).graph.node}
    assert "GroupQueryAttention" in nodes and "Attention" not in nodes
    assert np.isfinite(LLM(bundle).score(range(20))).all()
    with pytest.raises(InputError, match=r"attention heads are 8 wide; .* a KV cache in int8 .* Use --kv float"):
        compile(tmp_path / "narrow", tmp_path / "quantized", dataclasses.replace(RECIPE, kv="int8"))
