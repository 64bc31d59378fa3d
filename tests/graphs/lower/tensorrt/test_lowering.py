"""The graphs that TensorRT is given, run by ONNX Runtime on the CPU and held against PyTorch: all but NVIDIA's kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from corral.graphs import compile
from corral.model.checkpoint.open import open_checkpoint
from corral.model.checkpoint.reference import load_reference
from corral.model.text import Llama4Text
from corral.runtime import LLM
from corral.runtime.embedding import EmbeddingTable
from corral.runtime.kv_cache import KvCache
from corral.runtime.onnxruntime_session import OnnxRuntimeSession
from corral.runtime.session import CacheView, Step
from corral.spec.bundle import Bundle, open_bundle
from corral.spec.recipe import Recipe
from corral.validate.engine_graph import as_ready

CHUNK, GROUP = 16, 32
FORMS = ("scout", "maverick", "guard", "topk2")
WEIGHTS = ("fp16", "int4")
TOLERANCE = 4e-3  # of the logits' scale: float16 has 11 bits; 0.9e-3 to 1.5e-3 is seen
Checkpoint = Callable[[str], Path]
TinyBundle = Callable[[str, str, str], Path]
ClearlyRouted = Callable[[Llama4Text, int], list[int]]


def round_to_nearest(matrix: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs] -> what symmetric int4 in groups of 32 inputs makes of it."""
    groups = matrix.double().unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / 7).float().double()
    return ((groups / scale).round().clamp(-7, 7) * scale).flatten(-2).float()


@cache
def reference(directory: Path, weights: str) -> Llama4Text:
    model = load_reference(open_checkpoint(directory))
    if weights == "int4":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "experts.gate_up_proj" in name or "experts.down_proj" in name:
                    parameter.copy_(round_to_nearest(parameter.transpose(1, 2)).transpose(1, 2))
                elif parameter.dim() == 2 and "router" not in name and "embed" not in name:
                    parameter.copy_(round_to_nearest(parameter))
    return model


def opened(directory: Path) -> Bundle:
    """The lowered bundle as if it had its engine: its graph is run in the engine's place."""
    bundle = open_bundle(directory)
    assert bundle.manifest.stage == "lowered"
    return as_ready(bundle)


def reference_logits(directory: Path, weights: str, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return reference(directory, weights).logits(torch.tensor([ids]))[0].numpy()


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("form", FORMS)
def test_prefill_equals_the_reference_around_chunk_boundaries(
    tiny_checkpoint: Checkpoint, tiny_bundle: TinyBundle, clearly_routed: ClearlyRouted, form: str, weights: str
) -> None:
    bundle = opened(tiny_bundle(form, "tensorrt-rtx", weights))
    llm = LLM(bundle, session=OnnxRuntimeSession(bundle, threads=1), max_context=128)
    for count in (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5):
        ids = clearly_routed(reference(tiny_checkpoint(form), weights), count)
        assert_close(llm.score(ids), reference_logits(tiny_checkpoint(form), weights, ids))


def one_step(
    session: OnnxRuntimeSession,
    embed: EmbeddingTable,
    cache: KvCache,
    tokens: list[int],
    at: list[int],
    view: CacheView[Any],
) -> np.ndarray:
    """Logits [batch, vocab] of one decode step, row b at position `at[b]`."""
    step = Step(
        embeddings_BSH=embed(tokens)[:, None],
        positions_BS=np.array(at)[:, None],
        logit_rows_BR=np.zeros((len(at), 1), np.int64),
        past_length_B=cache.past_lengths(at),
        caches=view,
    )
    return session.run(step)[:, 0].copy()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("form", ["scout", "topk2"])
def test_decode_of_rows_at_different_positions_equals_the_reference(
    tiny_checkpoint: Checkpoint, tiny_bundle: TinyBundle, clearly_routed: ClearlyRouted, form: str, weights: str
) -> None:
    """Each row is decoded alone up to its own position, then all together across a chunk boundary for some of them."""
    bundle = opened(tiny_bundle(form, "tensorrt-rtx", weights))
    session, embed = OnnxRuntimeSession(bundle, threads=1), EmbeddingTable(bundle)
    lengths, together = [1, CHUNK - 2, CHUNK - 1, CHUNK, 2 * CHUNK + 3], 4
    model = reference(tiny_checkpoint(form), weights)
    ids = [clearly_routed(model, length + together) for length in lengths]
    cache = KvCache(bundle.manifest.kv, 128)
    cache.reserve(len(ids), 128)
    for slot, length in enumerate(lengths):
        for position in range(length):
            one_step(session, embed, cache, [ids[slot][position]], [position], cache.slot(slot))
    want = [reference_logits(tiny_checkpoint(form), weights, row) for row in ids]
    for turn in range(together):
        at = [length + turn for length in lengths]
        tokens = [row[position] for row, position in zip(ids, at, strict=True)]
        got = one_step(session, embed, cache, tokens, at, cache.prefix(len(ids)))
        for row, position, logits in zip(range(len(ids)), at, got, strict=True):
            assert_close(logits, want[row][position])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_costs_bandwidth_has_16_bits_or_less_and_what_needs_range_has_32(
    tiny_bundle: TinyBundle, weights: str
) -> None:
    directory = tiny_bundle("scout", "tensorrt-rtx", weights)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(directory / "decoder.onnx", load_external_data=False))
    values = (*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    for name in ("embeddings", "logits"):
        assert types[name] == full
    for name, kind in types.items():
        if name.startswith(("past_key", "past_value", "present_")):
            assert kind == half
    for node in inferred.graph.node:
        if node.op_type == "MatMul":
            assert types[node.output[0]] == (full if ".router." in node.name else half), node.name
        if node.op_type in ("RMSNormalization", "RotaryEmbedding", "TopK"):
            assert types[node.output[0]] == full
    layouts = {kv.kv_class: (kv.dtype, kv.fixed_rows) for kv in open_bundle(directory).manifest.kv}
    assert layouts == {"chunked": ("float16", CHUNK), "global": ("float16", 8192)}


def test_a_weight_beyond_float16_is_named_and_nothing_is_left(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    from corral.spec.errors import InputError

    shutil.copytree(tiny_checkpoint("guard"), tmp_path / "checkpoint")
    tensors = load_file(tmp_path / "checkpoint/model.safetensors")
    tensors["model.layers.2.self_attn.q_proj.weight"][3, 4] = 70000
    save_file(tensors, tmp_path / "checkpoint/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.2\.self_attn\.q_proj\.weight holds numbers up to 7e\+04; float16"):
        compile(tmp_path / "checkpoint", tmp_path / "out", Recipe(target="tensorrt-rtx", weights="fp16"))
    assert not (tmp_path / "out").exists()
