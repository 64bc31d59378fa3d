"""Parameter names and shapes follow the model, and each published spelling of them is understood."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from corral.model.checkpoint.names import FORMS, NameForm, detect_form, expected_parameters, is_dropped
from corral.model.text import Llama4Text
from corral.spec.model_config import parse_config

SCOUT_17B_16E = {
    "model_type": "llama4_text", "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192,
    "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
    "head_dim": 128, "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
}  # fmt: skip
MAVERICK_17B_128E = {
    **SCOUT_17B_16E, "num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False,
}  # fmt: skip


@pytest.mark.parametrize("form", ["scout", "maverick", "guard", "topk2", "tied"])
def test_expected_parameters_are_the_models(form: str, tiny_config: Callable[[str], dict[str, Any]]) -> None:
    config = parse_config(tiny_config(form))
    with torch.device("meta"):
        model = Llama4Text(config)
    assert list(expected_parameters(config).items()) == [(n, tuple(p.shape)) for n, p in model.named_parameters()]


@pytest.mark.parametrize(
    ("published", "billions"), [(SCOUT_17B_16E, 107.8), (MAVERICK_17B_128E, 400.7)], ids=["scout", "maverick"]
)
def test_published_models_have_their_published_size(published: dict[str, Any], billions: float) -> None:
    total = sum(math.prod(shape) for shape in expected_parameters(parse_config(published)).values())
    assert total / 1e9 == pytest.approx(billions, abs=0.05)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.description)
def test_each_spelling_is_detected(form: NameForm, tiny_config: Callable[[str], dict[str, Any]]) -> None:
    config = parse_config(tiny_config("scout"))
    names = [form.source(name) for name in expected_parameters(config)] + ["vision_model.class_embedding"]
    assert detect_form(names, config) is form
    assert detect_form(names[:3], config) is form


def test_a_name_outside_every_form_falls_to_the_first(tiny_config: Callable[[str], dict[str, Any]]) -> None:
    assert detect_form(["transformer.wte"], parse_config(tiny_config("scout"))) is FORMS[0]


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("vision_model.model.layers.0.self_attn.q_proj.weight", True),
        ("multi_modal_projector.linear_1.weight", True),
        ("model.vision_model.class_embedding", True),
        ("model.multi_modal_projector.linear_1.weight", True),
        ("model.layers.0.input_layernorm.weight", False),
        ("language_model.vision_model.weight", False),
    ],
)
def test_dropped_prefixes(name: str, dropped: bool) -> None:
    assert is_dropped(name) is dropped
