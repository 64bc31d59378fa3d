"""`config.json` in every spelling seen in the wild becomes the same facts, and contradictions are refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.spec.errors import InputError
from corral.spec.model_config import ModelConfig, RopeScaling, parse_config, read_config

Config = dict[str, Any]
SCALING = {
    "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
    "original_max_position_embeddings": 1024,
}  # fmt: skip
TYPES = ["chunked_attention", "chunked_attention", "chunked_attention", "full_attention", "chunked_attention"]


@pytest.fixture(scope="module")
def scout(tiny_config: Callable[[str], Config]) -> Callable[..., Config]:
    """`scout(key=value)` -> the tiny scout config.json with keys changed, or removed where the value is ..."""

    def make(**changes: Any) -> Config:
        merged = tiny_config("scout") | changes
        return {key: value for key, value in merged.items() if value is not ...}

    return make


def facts(config: ModelConfig) -> str:
    """One letter a layer: r rope, n nope; capital where it has experts."""
    return "".join((letter.upper() if layer.moe else letter)
                   for layer in config.layers for letter in ("r" if layer.rope else "n"))  # fmt: skip


@pytest.mark.parametrize(("form", "expected"), [("scout", "RRRNR"), ("maverick", "rRrNr"), ("guard", "rrrnr")])
def test_layers_of_each_model(form: str, expected: str, tiny_config: Callable[[str], Config]) -> None:
    config = parse_config(tiny_config(form))
    assert facts(config) == expected
    assert [config.uses_rope(i) for i in range(5)] == [letter in "rR" for letter in expected]
    assert [layer.kv_class for layer in config.layers] == [["global", "chunked"][letter in "rR"] for letter in expected]
    assert config.kv_classes == ("chunked", "global")


@pytest.mark.parametrize(
    "spelling",
    [
        {"no_rope_layers": None},
        {"no_rope_layers": ...},
        {"no_rope_layers": [1, 1, 1, 0, 1]},
        {"no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0]},  # longer than the model: seen in the wild
        {"no_rope_layers": [], "no_rope_layer_interval": 4},
        {"moe_layers": None},
        {"moe_layers": [0, 1, 2, 3, 4]},
        {"moe_layers": [0, 1, 2, 3, 4], "interleave_moe_layer_step": 2},  # the list wins, as in transformers
        {"attn_temperature_tuning": 4},
        {"attn_temperature_tuning": ...},
        {"layer_types": TYPES},
        {"layer_types": None},
        {"rope_parameters": ..., "rope_theta": 500000.0, "rope_scaling": SCALING},
        {"rope_parameters": None, "rope_theta": 500000, "rope_scaling": SCALING},
        {"rope_parameters": ..., "rope_scaling": SCALING},  # theta has a default
        {"rope_theta": 500000.0, "rope_scaling": SCALING},  # both spellings, agreeing
        {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING, "rope_type": None}},
        {"use_qk_norm": ...},
        {"tie_word_embeddings": ...},
        {"num_experts_per_tok": ...},
        {"hidden_act": "silu", "attention_bias": False, "router_aux_loss_coef": 0.001, "something_new": [1]},
    ],
    ids=str,
)
def test_spellings_that_mean_the_same(scout: Callable[..., Config], spelling: Config) -> None:
    assert parse_config(scout(**spelling)) == parse_config(scout())


def test_a_multimodal_file_nests_the_text_config(scout: Callable[..., Config]) -> None:
    config = parse_config({"model_type": "llama4", "text_config": scout(), "vision_config": {"hidden_size": 3}})
    assert config.multimodal
    assert dataclasses.replace(config, multimodal=False) == parse_config(scout())


def test_a_multimodal_file_may_say_the_rest_outside(scout: Callable[..., Config]) -> None:
    text = scout(tie_word_embeddings=..., eos_token_id=..., bos_token_id=...)
    outer = {"tie_word_embeddings": True, "eos_token_id": 7, "bos_token_id": 6}
    config = parse_config({"model_type": "llama4", "text_config": text, **outer})
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids) == (6, (7,))


@pytest.mark.parametrize(("value", "expected"), [(None, ()), (5, (5,)), ([5, 6], (5, 6)), (..., ())])
def test_eos_ids(scout: Callable[..., Config], value: Any, expected: tuple[int, ...]) -> None:
    assert parse_config(scout(eos_token_id=value)).eos_token_ids == expected


def test_without_chunks_every_layer_is_global(scout: Callable[..., Config]) -> None:
    config = parse_config(scout(attention_chunk_size=None))
    assert config.kv_classes == ("global",)
    assert facts(config) == "RRRNR"
    assert parse_config(scout(attention_chunk_size=...)).attention_chunk_size == 8192


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "qwen3"}, r'model_type "qwen3"; corral compiles "llama4" and "llama4_text"'),
        ({"model_type": ...}, 'model_type "None"'),
        ({"model_type": "llama4"}, "no text_config object"),
        ({"vocab_size": ...}, "vocab_size is missing, expected a whole number"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected a whole number"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 1 << 40}, r"below 2\*\*31"),
        ({"hidden_size": 0, "head_dim": 16}, "hidden_size is 0, expected a positive number"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected 1 to 10000"),
        ({"num_hidden_layers": 1 << 30}, "expected 1 to 10000"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim is 15; rotary embedding needs an even one"),
        ({"attention_chunk_size": 0}, "attention_chunk_size is 0, expected at least 1"),
        ({"attention_chunk_size": "16"}, "attention_chunk_size is '16'"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok is 9, expected 1 to num_local_experts \(8\)"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"num_local_experts": 0, "moe_layers": [1]}, r"expected 1 to num_local_experts \(0\)"),
        ({"moe_layers": [5]}, "moe_layers names layer 5, but there are 5 layers"),
        ({"moe_layers": [-1]}, "moe_layers is .*, expected a list of whole numbers"),
        ({"moe_layers": 3}, "moe_layers is 3, expected a list"),
        ({"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers has 4 items for 5 layers"),
        ({"layer_types": TYPES[::-1]}, "layer_types and no_rope_layers disagree"),
        ({"layer_types": TYPES[:3]}, "layer_types and no_rope_layers disagree"),
        ({"layer_types": "full"}, "layer_types and no_rope_layers disagree"),
        ({"rope_theta": 10000.0}, r"disagree: \[10000\.0, 500000\.0\]"),
        ({"rope_scaling": {**SCALING, "factor": 8.0}}, "rope_scaling and rope_theta disagree: .*factor=8.0"),
        ({"rope_parameters": {"rope_type": "yarn"}}, 'rope_type is "yarn", expected "default" or "llama3"'),
        ({"rope_parameters": {"rope_type": "llama3"}}, "factor is missing, expected a positive number"),
        ({"rope_parameters": [1]}, "expected an object"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a positive number"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"floor_scale": 10**400}, "floor_scale is 1000"),
        ({"use_qk_norm": "false"}, "use_qk_norm is 'false', expected true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id is </s>, expected a token id"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; Llama 4 has 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
    ],
    ids=str,
)  # fmt: skip
def test_refusals(scout: Callable[..., Config], change: Config, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        parse_config(scout(**change), where="config.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 20) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(["rope_type", "a"]), inner, max_size=2),
    max_leaves=6,
)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_value_in_any_place_is_read_or_refused(scout: Callable[..., Config], data: st.DataObject) -> None:
    config = scout(moe_layers=[1], layer_types=TYPES)
    for key in data.draw(st.sets(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = data.draw(json_values)
    try:
        parsed = parse_config(config)
    except InputError:
        return
    assert len(parsed.layers) == parsed.num_layers
    assert all(math.isfinite(f) for f in parsed.inverse_frequencies())


def test_scaled_frequencies_by_hand(scout: Callable[..., Config]) -> None:
    """theta 16, width 8: wavelengths 2 pi times 1, 2, 4, 8; scaled are those longer than 32 / 1."""
    rope = {**SCALING, "rope_theta": 16.0, "factor": 8.0, "original_max_position_embeddings": 32}
    frequencies = parse_config(scout(head_dim=8, rope_parameters=rope)).inverse_frequencies()
    assert frequencies == [1, 1 / 2, 1 / 4, 1 / 8 / 8]


def test_frequencies_between_the_factors_are_interpolated(scout: Callable[..., Config]) -> None:
    """low 1, high 4, original 16: 2 pi is between 16 / 4 and 16 / 1. ratio 16 / (2 pi) = 2.546, smooth 0.5155."""
    rope = {**SCALING, "factor": 8.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    first = parse_config(scout(rope_parameters=rope)).inverse_frequencies()[0]
    assert first == pytest.approx((1 - 0.515493) / 8 + 0.515493, abs=1e-6)


def test_json_round_trip(tiny_config: Callable[[str], Config]) -> None:
    for form in ("scout", "maverick", "guard"):
        config = parse_config(tiny_config(form))
        assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert isinstance(parse_config(tiny_config("scout")).rope_scaling, RopeScaling)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "does not exist: a checkpoint directory needs a config.json"),
        (b"{", "not readable JSON"),
        (b"\xff", "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not readable JSON"),
        (b"[]", "holds a JSON list, expected an object"),
    ],
    ids=["missing", "cut", "not text", "deep", "long number", "list"],
)
def test_unreadable_files(tmp_path: Path, text: bytes | None, reason: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(InputError, match=reason):
        read_config(tmp_path / "config.json")
