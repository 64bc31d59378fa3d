"""`config.json` -> facts about each layer, decided once.

Every reader of a Llama 4 config must resolve the same puzzles: multimodal files nest `text_config`; old files say
`rope_theta` + `rope_scaling`, new ones `rope_parameters`; `no_rope_layers` may be empty and a 1 in it means that rope
*is* used; `moe_layers` may be null; Llama Guard 4 has no MoE layer at all. All of it is resolved here, sources that
disagree are refused, and the rest of corral asks `config.layers[i]`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from corral.spec.errors import InputError
from corral.spec.typed_json import TypedJson

KvClass = Literal["chunked", "global"]
MODEL_TYPES = ("llama4", "llama4_text")
POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "intermediate_size_mlp", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "floor_scale",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """llama3-style frequency scaling (Llama 3.1 report; `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What one decoder layer is."""

    rope: bool  # rotated, qk-normed if the model is, chunked; a layer without it (nope) is global, with temperature
    moe: bool  # routed experts + a shared one; otherwise a dense MLP of `intermediate_size_mlp`
    kv_class: KvClass


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The text decoder of a Llama 4 model. Field names are Hugging Face's; widths in elements, lengths in tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of one expert, and of the shared expert
    intermediate_size_mlp: int  # of a dense layer
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    rms_norm_eps: float
    use_qk_norm: bool
    rope_theta: float
    rope_scaling: RopeScaling | None
    attention_chunk_size: int | None
    attn_temperature_tuning: bool
    floor_scale: float
    attn_scale: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    layers: tuple[LayerConfig, ...]
    multimodal: bool = False  # tensors are named `language_model.…`, and a vision tower lies beside them

    def __post_init__(self) -> None:
        for field in POSITIVE:
            if not 0 < getattr(self, field) < math.inf:  # NaN is refused, too
                raise InputError(f"config: {field} is {getattr(self, field)}, expected a positive number.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config: num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise InputError(f"config: head_dim is {self.head_dim}; rotary embedding needs an even one.")
        if not self.layers:
            raise InputError("config: num_hidden_layers is 0, expected at least one layer.")
        if self.attention_chunk_size is not None and self.attention_chunk_size < 1:
            raise InputError(f"config: attention_chunk_size is {self.attention_chunk_size}, expected at least 1.")
        if any(layer.moe for layer in self.layers) and not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise InputError(
                f"config: num_experts_per_tok is {self.num_experts_per_tok}, expected 1 to num_local_experts "
                f"({self.num_local_experts})."
            )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def kv_classes(self) -> tuple[KvClass, ...]:
        """The KV classes in use, chunked first."""
        every: tuple[KvClass, ...] = ("chunked", "global")
        return tuple(kv_class for kv_class in every if any(layer.kv_class == kv_class for layer in self.layers))

    def uses_rope(self, i: int) -> bool:
        """Whether layer `i` is a rope layer. Ask this, never `no_rope_layers`, whose name says the opposite."""
        return self.layers[i].rope

    def inverse_frequencies(self) -> list[float]:
        """Rotary frequencies [head_dim / 2], llama3-scaled where the config says so.

        Formula: RoFormer §3.2.2 for the base; for the scaling, Llama 3.1 as in `llama-models` `apply_scaling`. With
        `low_freq_factor == high_freq_factor` (Scout) no interpolation band exists.

        Each step is rounded to float32, as in the reference: angles are frequency * position, so that a last bit of
        difference here is 0.01 radians at position 100,000.
        """
        exponents = [np.float32(d) / np.float32(self.head_dim) for d in range(0, self.head_dim, 2)]
        base = [np.float32(1) / np.float32(self.rope_theta ** float(e)) for e in exponents]
        scaling = self.rope_scaling
        return [float(f if scaling is None else _scale_frequency(f, scaling)) for f in base]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_json`. Raises InputError for missing or unknown keys."""
        data = dict(data)
        try:
            data["layers"] = tuple(LayerConfig(**layer) for layer in data["layers"])
            data["eos_token_ids"] = tuple(data["eos_token_ids"])
            data["rope_scaling"] = RopeScaling(**data["rope_scaling"]) if data["rope_scaling"] else None
            return ModelConfig(**data)
        except (KeyError, TypeError) as error:
            raise InputError(f"model config in the manifest is not readable: {error}.") from None


def _scale_frequency(frequency: np.float32, s: RopeScaling) -> np.float32:
    wavelength = np.float32(2 * math.pi) / frequency
    if wavelength > s.original_max_position_embeddings / s.low_freq_factor:
        return frequency / np.float32(s.factor)
    if wavelength < s.original_max_position_embeddings / s.high_freq_factor:
        return frequency
    if s.high_freq_factor == s.low_freq_factor:
        return frequency
    ratio = np.float32(s.original_max_position_embeddings) / wavelength
    smooth = (ratio - np.float32(s.low_freq_factor)) / np.float32(s.high_freq_factor - s.low_freq_factor)
    return (np.float32(1) - smooth) * frequency / np.float32(s.factor) + smooth * frequency


def read_config(path: Path) -> ModelConfig:
    """Read a Hugging Face `config.json`, multimodal (`llama4`) or bare (`llama4_text`), in old and new spellings.

    Raises InputError where the file is missing, not JSON, of another architecture, or contradicts itself.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: a checkpoint directory needs a config.json.") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, absurdly long numbers
        raise InputError(f"{path} is not readable JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds a JSON {type(raw).__name__}, expected an object.")
    return parse_config(raw, where=str(path))


def parse_config(raw: dict[str, Any], *, where: str = "config") -> ModelConfig:
    """`read_config` for an already parsed object; `where` names it in errors."""
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise InputError(
            f'{where} is model_type "{model_type}"; corral compiles '
            + " and ".join(f'"{t}"' for t in MODEL_TYPES)
            + "."
        )
    multimodal = model_type == "llama4"
    text = raw.get("text_config") if multimodal else raw
    if not isinstance(text, dict):
        raise InputError(f'{where} has no text_config object, which a "llama4" config must have.')
    read = TypedJson(text, where)
    num_layers = read.integer("num_hidden_layers")
    if not 0 < num_layers <= 10_000:
        raise InputError(f"{where}: num_hidden_layers is {num_layers}, expected 1 to 10000.")
    _refuse_unsupported(text, where)
    rope_theta, scaling = _rope(text, where)
    heads = read.integer("num_attention_heads")
    hidden = read.integer("hidden_size")
    chunk = read.optional_integer("attention_chunk_size", 8192)
    eos = text.get("eos_token_id", raw.get("eos_token_id"))
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(item) is int and item >= 0 for item in eos_ids):
        raise InputError(f"{where}: eos_token_id is {str(eos)[:80]}, expected a token id or a list of them.")
    # Older transformers say whether embeddings are tied beside text_config, newer ones inside.
    tied = TypedJson(text if "tie_word_embeddings" in text else raw, where).flag("tie_word_embeddings", False)
    return ModelConfig(
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.integer("intermediate_size"),
        intermediate_size_mlp=read.integer("intermediate_size_mlp", read.integer("intermediate_size")),
        num_attention_heads=heads,
        num_key_value_heads=read.integer("num_key_value_heads", heads),
        head_dim=read.integer("head_dim", hidden // max(heads, 1)),
        num_local_experts=read.integer("num_local_experts", 0),
        num_experts_per_tok=read.integer("num_experts_per_tok", 1),
        rms_norm_eps=read.number("rms_norm_eps", 1e-5),
        use_qk_norm=read.flag("use_qk_norm", True),
        rope_theta=rope_theta,
        rope_scaling=scaling,
        attention_chunk_size=chunk,
        attn_temperature_tuning=read.flag("attn_temperature_tuning", True),
        floor_scale=read.number("floor_scale", 8192),
        attn_scale=read.number("attn_scale", 0.1),
        tie_word_embeddings=tied,
        max_position_embeddings=read.integer("max_position_embeddings", 131072),
        bos_token_id=TypedJson(text if "bos_token_id" in text else raw, where).optional_integer("bos_token_id", None),
        eos_token_ids=tuple(eos_ids),
        layers=_layers(read, num_layers, chunk),
        multimodal=multimodal,
    )


def _refuse_unsupported(text: dict[str, Any], where: str) -> None:
    supported = {"hidden_act": "silu", "attention_bias": False}
    for key, value in supported.items():
        if text.get(key, value) != value:
            raise InputError(f"{where}: {key} is {text[key]!r}; Llama 4 has {value!r}, and corral supports only that.")


def _rope(text: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from the new spelling, the old one, or both where they agree."""
    places = [text[key] for key in ("rope_parameters", "rope_scaling") if text.get(key)]
    if not all(isinstance(place, dict) for place in places):
        raise InputError(f"{where}: rope_parameters or rope_scaling is {str(places)[:80]}, expected an object.")
    told = [TypedJson(place, where) for place in (text, *places) if place.get("rope_theta") is not None]
    thetas = [place.number("rope_theta") for place in told]
    scalings = [_rope_scaling(TypedJson(place, where)) for place in places]
    for values in (thetas, scalings):
        if len(set(values)) > 1:
            raise InputError(f"{where}: rope_parameters, rope_scaling and rope_theta disagree: {values}.")
    return thetas[0] if thetas else 500000.0, scalings[0] if scalings else None


def _rope_scaling(read: TypedJson) -> RopeScaling | None:
    kind = read.data.get("rope_type") or read.data.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f'{read.where}: rope_type is "{kind}", expected "default" or "llama3".')
    return RopeScaling(
        factor=read.number("factor"),
        low_freq_factor=read.number("low_freq_factor"),
        high_freq_factor=read.number("high_freq_factor"),
        original_max_position_embeddings=read.integer("original_max_position_embeddings"),
    )


def _layers(read: TypedJson, num_layers: int, chunk: int | None) -> tuple[LayerConfig, ...]:
    """What every layer is. `no_rope_layers` and `moe_layers` win over the intervals; `layer_types` must agree."""
    where = read.where
    interval = read.integer("no_rope_layer_interval", 4) or 4
    rope = read.integers("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(num_layers)]
    if len(rope) < num_layers:
        raise InputError(f"{where}: no_rope_layers has {len(rope)} items for {num_layers} layers.")
    step = read.integer("interleave_moe_layer_step", 1)
    named = read.integers("moe_layers")
    interleaved = range(step - 1, num_layers, step) if step and read.integer("num_local_experts", 0) else ()
    moe = set(interleaved if named is None else named)
    if moe and max(moe) >= num_layers:
        raise InputError(f"{where}: moe_layers names layer {max(moe)}, but there are {num_layers} layers.")
    types = read.data.get("layer_types")
    expected = ["chunked_attention" if r and chunk else "full_attention" for r in rope[:num_layers]]
    if types is not None and chunk and (not isinstance(types, list) or types[:num_layers] != expected):
        raise InputError(
            f"{where}: layer_types and no_rope_layers disagree; by no_rope_layers (1 means that rope is used) it would "
            f"be {', '.join(expected[:8])}, not {str(types)[:200]}."
        )
    return tuple(
        LayerConfig(rope=bool(rope[i]), moe=i in moe, kv_class="chunked" if rope[i] and chunk else "global")
        for i in range(num_layers)
    )
