"""params.json -> config: Meta's formulas give the published shapes."""

from __future__ import annotations

from typing import Any

import pytest

from corral.spec.errors import InputError
from corral.spec.meta_params import parse_params
from corral.spec.presets import preset_named

# Keys of ModelArgs (llama-models, models/llama4/args.py), with the values that the published shapes follow from.
SCOUT: dict[str, Any] = {
    "dim": 5120, "n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "vocab_size": 202048, "ffn_dim_multiplier": 1.2,
    "ffn_exp": 4.0, "multiple_of": 2048, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
    "attention_chunk_size": 8192, "nope_layer_interval": 4, "use_qk_norm": True, "attn_temperature_tuning": True,
    "moe_args": {"num_experts": 16, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1},
    "vision_args": {"dim": 1408},
}  # fmt: skip
MAVERICK = SCOUT | {
    "use_scaled_rope": False,
    "use_qk_norm": False,
    "moe_args": {"num_experts": 128, "interleave_moe_layer_step": 2},
}


@pytest.mark.parametrize(("name", "params"), [("scout", SCOUT), ("maverick", MAVERICK)])
def test_the_published_models(name: str, params: dict[str, Any]) -> None:
    assert parse_params(params, vocab_size=202048, where="params") == preset_named(name).model


def test_the_model_may_be_nested_and_the_vocabulary_unsaid() -> None:
    nested = {"model": SCOUT | {"vocab_size": -1}}
    assert parse_params(nested, vocab_size=202048, where="params") == preset_named("scout").model


def test_a_dense_model_and_a_small_vocabulary() -> None:
    dense = SCOUT | {
        "moe_args": None,
        "vocab_size": 300,
        "ffn_dim_multiplier": 0.6,
        "nope_layer_interval": None,
        "vision_args": None,
    }
    config = parse_params(dense, vocab_size=300, where="params")
    assert config.intermediate_size_mlp == 8192
    assert not any(layer.moe for layer in config.layers) and all(layer.rope for layer in config.layers)
    assert (config.bos_token_id, config.eos_token_ids, config.multimodal) == (None, (), False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": None}, "dim is missing, expected a whole number"),
        ({"n_layers": 0}, "n_layers is 0, expected 1 to 10000"),
        ({"n_heads": 0}, "dim 5120 is not n_heads 0 times"),
        ({"n_heads": 48}, "dim 5120 is not n_heads 48 times"),
        ({"n_kv_heads": 7}, "not a multiple of num_key_value_heads"),
        ({"ffn_exp": None}, "ffn_exp is missing"),
        ({"lora_args": {"rank": 16}}, "has lora_args: these weights are quantized"),
        ({"model": 3}, "model is a JSON int"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_params(SCOUT | change, vocab_size=202048, where="params")
