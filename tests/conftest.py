"""Fixtures for every test: tiny random Llama 4 checkpoints with each branch of the architecture on."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test talks to a hub
# Tensors here are tiny: a second thread only waits (30 times slower beside another load). Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TinyCheckpoint = Callable[[str], Path]
TinyBundle = Callable[..., Path]
PublishedCheckpoint = Callable[..., tuple[Path, Path]]
MetaCheckpoint = Callable[[str, int], tuple[Path, Path]]

CHUNK = 16
# Five layers: rope, rope, rope, nope, rope. The chunk ends after 16 tokens, the temperature rises every 8.
SCOUT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 64,
    "intermediate_size_mlp": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 8,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "no_rope_layers": [],
    "attention_chunk_size": CHUNK,
    "attn_temperature_tuning": True,
    "floor_scale": 8,
    "attn_scale": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": [257, 258],
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        # So that about half of the eight frequencies are scaled.
        "original_max_position_embeddings": 1024,
    },
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
FORMS: dict[str, dict[str, Any]] = {
    "scout": SCOUT,
    "maverick": {**SCOUT, "interleave_moe_layer_step": 2, "use_qk_norm": False, "rope_parameters": PLAIN_ROPE},
    "guard": {**SCOUT, "moe_layers": [], "num_local_experts": 0},
    "topk2": {**SCOUT, "num_experts_per_tok": 2},
    "tied": {**SCOUT, "tie_word_embeddings": True},
    "two_layers": {**SCOUT, "num_hidden_layers": 2, "interleave_moe_layer_step": 2},
}
# What published checkpoints say of their quantized weights: format, and `weights` of the one group in `config_groups`.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8 per output": ("float-quantized", {"type": "float", "num_bits": 8, "strategy": "channel"}),
    "fp8 per tensor": ("float-quantized", {"type": "float", "num_bits": 8, "strategy": "tensor"}),
    "fp8 per 16x32 block": (
        "naive-quantized",
        {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [16, 32]},
    ),
    "int4 g32": ("pack-quantized", {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32}),
    "int4 g32 asymmetric": (
        "pack-quantized",
        {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "int4 per output": ("pack-quantized", {"type": "int", "num_bits": 4, "strategy": "channel"}),
}
EXPERTS = r"feed_forward\.experts\."  # what the published FP8 Maverick has quantized
MLPS = r"feed_forward\.(?!router)"  # what llm-compressor's examples for Llama 4 quantize
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot|>", "<|header_start|>", "<|header_end|>")
CHAT_TEMPLATE = (
    "{{- bos_token }}{% for message in messages %}<|header_start|>{{ message['role'] }}<|header_end|>\n\n"
    "{{ message['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)


@pytest.fixture(scope="session")
def cpu_kernels() -> None:
    """Skips where corral's CPU kernels are not built for want of a C++ compiler, and only there."""
    from corral.kernels.library import PATH

    if not PATH.is_file() and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler, so corral's CPU kernels are not built")


@pytest.fixture(scope="session")
def tiny_config() -> Callable[[str], dict[str, Any]]:
    """`tiny_config("scout")` -> a fresh `llama4_text` config.json of that form, to change at will."""
    return lambda form: deepcopy({"model_type": "llama4_text", **FORMS[form]})


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """`tiny_checkpoint("scout")` -> a checkpoint directory with tokenizer, made once. Do not write into it.

    Forms: scout (MoE everywhere, qk norm, scaled rope), maverick (MoE in every second layer, no qk norm, plain rope),
    guard (dense), topk2 (two experts a token), tied (embeddings), two_layers (a dense one, one with MoE), all float32 as
    transformers saves them; multimodal
    (scout's weights in bf16, named as in the published files, in two shards, beside a vision tower).
    """
    made: dict[str, Path] = {}

    def make(form: str) -> Path:
        if form not in made:
            directory = tmp_path_factory.mktemp(form)
            if form == "multimodal":
                _save_multimodal(make("scout"), directory)
            else:
                _save_transformers(form, directory)
            _save_tokenizer(directory)
            made[form] = directory
        return made[form]

    return make


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    """`tiny_bundle("scout", "cpu", "int4")` -> a bundle compiled of that tiny checkpoint, made once. Do not write into it.

    A fourth argument names the kernels, a fifth the type of the KV cache.
    """
    made: dict[tuple[str, ...], Path] = {}

    def make(form: str, target: str, weights: str, kernels: str = "stock", kv: str = "float") -> Path:
        from corral.graphs import compile
        from corral.spec.recipe import Recipe

        key = (form, target, weights, kernels, kv)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("-".join(key))
            how = {"group_size": 32, "kernels": kernels, "kv": kv, "calibration_tokens": 1024}
            recipe = Recipe.from_json({"target": target, "weights": weights, **how})
            compile(tiny_checkpoint(form), made[key], recipe)
        return made[key]

    return make


@pytest.fixture(scope="session")
def published_checkpoint(
    tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> PublishedCheckpoint:
    """`published_checkpoint("maverick", "fp8 per output")` -> (directory, directory), made once. Do not write into them.

    The first is quantized and written by the compressed-tensors library itself: experts one by one, matrices whose names
    match `quantized` in that scheme, the rest in bf16. The second holds the same numbers, dequantized by that library in
    float32, as a plain checkpoint with fused experts.
    """
    made: dict[tuple[str, str, str], tuple[Path, Path]] = {}

    def make(form: str, published: str, quantized: str = MLPS) -> tuple[Path, Path]:
        key = (form, published, quantized)
        if key not in made:
            root = tmp_path_factory.mktemp("published")
            made[key] = root / "quantized", root / "plain"
            _save_published(tiny_checkpoint(form), form, published, quantized, *made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def meta_checkpoint(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> MetaCheckpoint:
    """`meta_checkpoint("scout", 2)` -> (Meta's form in two shards, Hugging Face's form of the same weights), made once.

    Forms as of `tiny_checkpoint`, but with the lengths of rope scaling that Meta's code has built in.
    """
    made: dict[tuple[str, int], tuple[Path, Path]] = {}

    def make(form: str, shards: int) -> tuple[Path, Path]:
        if (form, shards) not in made:
            directory = tmp_path_factory.mktemp(f"{form}-meta-{shards}")
            hugging_face = directory / "hf"
            shutil.copytree(tiny_checkpoint(form), hugging_face)
            config = json.loads((hugging_face / "config.json").read_text())
            if config["rope_parameters"]["rope_type"] == "llama3":
                config["rope_parameters"]["original_max_position_embeddings"] = 8192
            (hugging_face / "config.json").write_text(json.dumps(config))
            _save_meta(hugging_face, directory / "meta", shards)
            made[form, shards] = directory / "meta", hugging_face
        return made[form, shards]

    return make


def _save_published(source: Path, form: str, published: str, quantized: str, out: Path, plain_out: Path) -> None:
    import re

    import torch
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, values in load_file(source / "model.safetensors").items():
        name, values = f"language_model.{name}", values.bfloat16()
        matrices = _linear_layers(name, values)
        if not matrices or not re.search(quantized, name):
            tensors[name] = plain[name] = values
            continue
        stored = {module: _compress(matrix, published) for module, matrix in matrices.items()}
        for module, (local, _) in stored.items():
            tensors |= {f"{module}.{last}": tensor for last, tensor in local.items()}
        exact = [values_ for _, values_ in stored.values()]
        if len(exact) == 1 and values.ndim == 2:
            plain[name] = exact[0]
        elif name.endswith("gate_up_proj"):
            both = [torch.cat(pair) for pair in zip(exact[0::2], exact[1::2], strict=True)]
            plain[name] = torch.stack([matrix.T for matrix in both])
        else:
            plain[name] = torch.stack([matrix.T for matrix in exact])
    form_, weights = PUBLISHED[published]
    token = {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": form_,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "input_activations": token if form_ == "float-quantized" else None}},
        "ignore": ["re:.*lm_head", "re:.*self_attn", "re:.*router"],
        "kv_cache_scheme": None,
    }
    text = {"model_type": "llama4_text", **deepcopy(FORMS[form])}
    for directory, contents, extra in (
        (out, tensors, {"quantization_config": quantization}),
        (plain_out, plain, {}),
    ):
        directory.mkdir()
        save_file({n: t.contiguous() for n, t in contents.items()}, directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": text, **extra}))
        _save_tokenizer(directory)


def _linear_layers(name: str, values: Any) -> dict[str, Any]:
    """Module -> matrix [outputs, inputs] of the linear layers that a quantizer makes of a tensor; {} where it is none."""
    if values.ndim == 2 and "embed" not in name:
        return {name.removesuffix(".weight"): values}
    experts, _, last = name.rpartition(".")
    if values.ndim != 3:
        return {}
    if last == "down_proj":
        return {f"{experts}.{e}.down_proj": matrix.T for e, matrix in enumerate(values)}
    half = values.shape[2] // 2
    both = {"gate_proj": slice(0, half), "up_proj": slice(half, None)}
    return {f"{experts}.{e}.{p}": matrix.T[cut] for e, matrix in enumerate(values) for p, cut in both.items()}


def _compress(matrix: Any, published: str) -> tuple[dict[str, Any], Any]:
    """The tensors that the compressed-tensors library stores for a matrix, and their exact values."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    form, weights = PUBLISHED[published]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    compressor, (rows, columns) = BaseCompressor.get_value_from_registry(form), matrix.shape
    whole = rows if weights["strategy"] == "tensor" else 1
    height, width = weights.get("block_structure", (whole, weights.get("group_size", columns)))
    blocks = matrix.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    scale, zero_point = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), scheme.weights)
    scale = scale.bfloat16().reshape((1,) if weights["strategy"] == "tensor" else scale.shape)
    local = compressor.compress({"weight": matrix, "weight_scale": scale, "weight_zero_point": zero_point}, scheme)
    exact = compressor.decompress({**local, "weight_scale": scale.float()}, scheme)["weight"]
    return local, exact


def _save_meta(hugging_face: Path, directory: Path, shards: int) -> None:
    """The inverse of transformers' convert_llama4_weights_to_hf.py, shard by shard and with Meta's names.

    As llama-models builds its modules at that tensor-parallel size (models/llama4/model.py, moe.py, ffn.py).
    """
    import torch
    from safetensors.torch import load_file

    hf = {name.removeprefix("model."): t for name, t in load_file(hugging_face / "model.safetensors").items()}
    config = json.loads((hugging_face / "config.json").read_text())
    directory.mkdir()
    for rank in range(shards):

        def rows(name: str, rank: int = rank) -> torch.Tensor:
            return hf[name].chunk(shards, dim=0)[rank]

        def columns(name: str, rank: int = rank) -> torch.Tensor:
            return hf[name].chunk(shards, dim=-1)[rank]

        state: dict[str, Any] = {
            "tok_embeddings.weight": rows("embed_tokens.weight"),
            "norm.weight": hf["norm.weight"],
            "output.weight": rows("lm_head.weight"),
            "rope.freqs": torch.ones(8),
            "vision_embeddings.vision_encoder.class_embedding": torch.zeros(8),
            "vision_projection.weight": torch.zeros(64 // shards, 8),
        }
        for i in range(config["num_hidden_layers"]):
            ours, theirs = f"layers.{i}.", f"layers.{i}."
            attention = [rows(f"{ours}self_attn.{letter}_proj.weight") for letter in "qkv"]
            state |= {
                f"{theirs}attention.wqkv.layer_norm_weight": hf[f"{ours}input_layernorm.weight"],
                f"{theirs}attention.wqkv.weight": torch.cat(attention),
                f"{theirs}attention.wqkv._extra_state": io.BytesIO(b"state of Transformer Engine"),
                f"{theirs}attention.wo.weight": columns(f"{ours}self_attn.o_proj.weight"),
            }
            norm = hf[f"{ours}post_attention_layernorm.weight"]
            mlp, name = f"{ours}feed_forward.", f"{theirs}feed_forward."
            if f"{mlp}router.weight" not in hf:
                fc1 = [rows(f"{mlp}gate_proj.weight"), rows(f"{mlp}up_proj.weight")]
                state |= {
                    f"{name}mlp.layer_norm_weight": norm,
                    f"{name}mlp.fc1_weight": torch.cat(fc1),
                    f"{name}mlp.fc2_weight": columns(f"{mlp}down_proj.weight"),
                }
                continue
            gate, up = hf[f"{mlp}experts.gate_up_proj"].chunk(2, dim=-1)
            down = hf[f"{mlp}experts.down_proj"]
            state |= {
                f"{name}norm.weight": norm,
                f"{name}router_DE": hf[f"{mlp}router.weight"].t(),
                f"{name}w_in_shared_FD.weight": rows(f"{mlp}shared_expert.gate_proj.weight"),
                f"{name}w_swiglu_FD.weight": rows(f"{mlp}shared_expert.up_proj.weight"),
                f"{name}w_out_shared_DF.weight": columns(f"{mlp}shared_expert.down_proj.weight"),
                f"{name}experts.moe_w_in_eD_F": gate.chunk(shards, dim=-1)[rank].flatten(0, 1),
                f"{name}experts.moe_w_swiglu_eD_F": up.chunk(shards, dim=-1)[rank].flatten(0, 1),
                f"{name}experts.moe_w_out_eF_D": down.chunk(shards, dim=1)[rank].flatten(0, 1),
            }
        # Of their own storage each, as training writes them.
        state = {key: t.contiguous().clone() if isinstance(t, torch.Tensor) else t for key, t in state.items()}
        torch.save(state, directory / f"consolidated.{rank:02}.pth")
    moe = {"num_experts": 8, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": config["num_experts_per_tok"]}
    params = {
        "dim": 64,
        "n_layers": 5,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        # By Meta's formula experts are 64 wide, dense layers 128.
        "ffn_dim_multiplier": 0.6,
        "ffn_exp": 4.0,
        "multiple_of": 64,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_scaled_rope": config["rope_parameters"]["rope_type"] == "llama3",
        "attention_chunk_size": CHUNK,
        "nope_layer_interval": 4,
        "use_qk_norm": config["use_qk_norm"],
        "attn_temperature_tuning": True,
        "floor_scale": 8.0,
        "attn_scale": 0.1,
        "vision_args": {"dim": 8},
        "moe_args": moe | {"interleave_moe_layer_step": config["interleave_moe_layer_step"]},
    }
    if not config["num_local_experts"]:
        params["moe_args"] = None
    (directory / "params.json").write_text(json.dumps(params))


def _save_transformers(form: str, directory: Path) -> None:
    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    model = Llama4ForCausalLM(Llama4TextConfig(**deepcopy(FORMS[form])))
    generator = torch.Generator().manual_seed(sorted(FORMS).index(form))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:  # wide enough that experts are used diversely and logits are far apart
                parameter.normal_(0, 0.08, generator=generator)
    model.save_pretrained(directory)


def _save_multimodal(scout: Path, directory: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    text = {name: tensor.bfloat16() for name, tensor in load_file(scout / "model.safetensors").items()}
    tensors = {f"language_model.{name}": tensor for name, tensor in text.items()}
    tensors["vision_model.class_embedding"] = torch.zeros(8, dtype=torch.bfloat16)
    tensors["multi_modal_projector.linear_1.weight"] = torch.zeros(64, 8, dtype=torch.bfloat16)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, directory / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    text_config = deepcopy({"model_type": "llama4_text", **SCOUT})
    rope = text_config.pop("rope_parameters")
    # As in the published files: the old spelling of rope.
    text_config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "attn_temperature_tuning": 4}
    (directory / "config.json").write_text(
        json.dumps({"model_type": "llama4", "text_config": text_config, "vision_config": {"hidden_size": 8}})
    )
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))


def _save_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges: ids 0 to 255 are bytes, then the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[2]})
    )
