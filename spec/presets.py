"""The herd's sizes on one screen: each model's config, what its makers say of it, and which figures are inferred.

`scout`, `maverick` and `guard` follow the published config.json files (the text decoder's part). Behemoth was never
released: its shape is chosen here so that the published counts come out, and `inferred` names every field that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from corral.spec.errors import InputError
from corral.spec.model_config import ModelConfig, parse_config

SYNTHETIC = "synthetic:"  # before a preset's name: a checkpoint of made-up weights
# What the herd shares. `config` of a preset adds to it or overrides it.
HERD: dict[str, Any] = {
    "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
    "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "rope_scaling": None, "use_qk_norm": True, "attention_chunk_size": 8192,
    "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1, "max_position_embeddings": 10 << 20,
    "tie_word_embeddings": False, "bos_token_id": 200000, "eos_token_id": [200001, 200007, 200008],
}  # fmt: skip
SCALED_ROPE = {
    "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
# Counted from the published vision_config: 34 layers of width 1408 (809 M), patches and positions (2 M), pixel shuffle
# and projector (61 M).
VISION_PARAMETERS = 871_000_000


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One model of the herd, without its weights, which are bfloat16.

    `published_total` and `published_active` are the makers' own figures and count the vision tower, whose
    `vision_parameters` are not part of `config`: corral does not compile it. 0 means that nothing is published.
    """

    name: str
    title: str
    config: dict[str, Any]
    published_total: float = 0
    published_active: float = 0
    vision_parameters: int = VISION_PARAMETERS
    inferred: tuple[str, ...] = ()
    dtype: str = "bfloat16"

    @property
    def model(self) -> ModelConfig:
        return parse_config(self.config_json, where=f"preset {self.name}")

    @property
    def config_json(self) -> dict[str, Any]:
        """What a `config.json` of this model would hold: multimodal, as the published ones are."""
        return {"model_type": "llama4", "text_config": HERD | self.config}


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="scout",
            title="Llama 4 Scout",
            config={"rope_scaling": SCALED_ROPE},
            published_total=109e9,
            published_active=17e9,
        ),
        Preset(
            name="maverick",
            title="Llama 4 Maverick",
            config={
                "num_local_experts": 128,
                "interleave_moe_layer_step": 2,
                "use_qk_norm": False,
                "max_position_embeddings": 1 << 20,
            },
            published_total=400e9,
            published_active=17e9,
        ),
        Preset(
            name="behemoth",
            title="Llama 4 Behemoth",
            config={
                "hidden_size": 16384,
                "intermediate_size": 24064,
                "intermediate_size_mlp": 48128,
                "num_hidden_layers": 96,
                "num_attention_heads": 128,
                "max_position_embeddings": 256 << 10,
            },
            published_total=2000e9,
            published_active=288e9,
            # Of its text decoder only the 16 routed experts, one of them a token, are published.
            inferred=tuple(sorted(HERD.keys() - {"num_local_experts", "num_experts_per_tok"})),
        ),
        Preset(
            name="guard",
            title="Llama Guard 4",
            config={
                "intermediate_size_mlp": 8192,
                "num_local_experts": 0,
                "moe_layers": [],
                "rope_scaling": SCALED_ROPE,
            },
            published_total=12e9,
            published_active=12e9,
        ),
        Preset(
            name="debug",
            title="a small Scout",
            config={
                "vocab_size": 1024,
                "hidden_size": 256,
                "intermediate_size": 256,
                "intermediate_size_mlp": 512,
                "num_hidden_layers": 4,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "attention_chunk_size": 128,
                "floor_scale": 128,
                "max_position_embeddings": 4096,
                "rope_scaling": SCALED_ROPE,
                "bos_token_id": None,
                "eos_token_id": None,
            },
            vision_parameters=0,
        ),
    )
}


def preset_named(name: str) -> Preset:
    """Look a preset up. Raises InputError naming those there are."""
    if name not in PRESETS:
        raise InputError(f'preset "{name[:80]}" is not known; expected one of {", ".join(PRESETS)}.')
    return PRESETS[name]
