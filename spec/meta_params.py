"""Meta's `params.json` -> ModelConfig: what `ModelArgs` of llama-models makes of it.

Sources, all in https://github.com/meta-llama/llama-models, models/llama4: args.py for keys and defaults, model.py and
moe.py for the widths of the feed-forward, tokenizer.py for the special tokens. No shape of a layer is written in the
file; the widths follow from `ffn_exp`, `ffn_dim_multiplier` and `multiple_of`, step by step with whole numbers.
"""

from __future__ import annotations

from typing import Any

from corral.spec.errors import InputError
from corral.spec.model_config import LayerConfig, ModelConfig, RopeScaling
from corral.spec.typed_json import TypedJson

PARAMS_NAME = "params.json"
# args.py: what scaled rope means where the file does not say; model.py, apply_scaling: the other two.
ROPE_SCALING_FACTOR, ROPE_HIGH_FREQUENCY = 16.0, 1.0
ROPE_LOW_FREQUENCY, ROPE_ORIGINAL_LENGTH = 1.0, 8192
# tokenizer.py: the vocabulary ends with so many special tokens, of which these have a role (place among them).
SPECIAL_TOKENS = 2048
BEGIN_OF_TEXT, END_OF_TEXT, END_OF_MESSAGE, END_OF_TURN = 0, 1, 7, 8
# The file does not say how long a sequence may be. As transformers' convert_llama4_weights_to_hf.py has it for the
# instruct models: 16 experts, other experts, none. The base models are published with 256k.
LONGEST_SCOUT, LONGEST_MOE, LONGEST_DENSE = 10 << 20, 1 << 20, 8192
WIDEST = 1024.0  # the largest factor of a width that is believed; the published ones are 1.2 and 4


def parse_params(raw: dict[str, Any], *, vocab_size: int, where: str) -> ModelConfig:
    """The config of a parsed `params.json`; `vocab_size` is the embedding's rows, which the file may leave out (-1).

    Raises InputError for keys that are missing, contradict each other, or say that the weights are quantized.
    """
    nested = raw.get("model", raw)
    if not isinstance(nested, dict):
        raise InputError(f"{where}: model is a JSON {type(nested).__name__}, expected an object.")
    read = TypedJson(nested, where)
    for key in ("quantization_args", "lora_args"):
        if nested.get(key) is not None:
            raise InputError(f"{where} has {key}: these weights are quantized. Give corral the bf16 checkpoint.")
    if nested.get("vocab_size") not in (None, -1, vocab_size):
        raise InputError(f"{where}: vocab_size is {nested['vocab_size']!r}, but the embedding has {vocab_size} rows.")
    hidden, heads, num_layers = read.integer("dim"), read.integer("n_heads"), read.integer("n_layers")
    if not 0 < num_layers <= 10_000:
        raise InputError(f"{where}: n_layers is {num_layers}, expected 1 to 10000.")
    head_dim = hidden // max(heads, 1)
    if head_dim * heads != hidden or read.integer("head_dim", head_dim) != head_dim:
        raise InputError(f"{where}: dim {hidden} is not n_heads {heads} times head_dim {nested.get('head_dim')}.")
    moe = _moe_args(read)
    chunk = read.optional_integer("attention_chunk_size", None)
    dense = _dense_width(read, hidden)
    experts = 0 if moe is None else moe.integer("num_experts")
    special = vocab_size - SPECIAL_TOKENS
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=dense if moe is None else _expert_width(read, moe, hidden),
        intermediate_size_mlp=dense,
        num_attention_heads=heads,
        num_key_value_heads=read.integer("n_kv_heads", heads),
        head_dim=head_dim,
        num_local_experts=experts,
        num_experts_per_tok=1 if moe is None else moe.integer("top_k", 1),
        rms_norm_eps=read.number("norm_eps", 1e-5),
        use_qk_norm=read.flag("use_qk_norm", False),
        rope_theta=read.number("rope_theta", 500000.0),
        rope_scaling=_rope_scaling(read),
        attention_chunk_size=chunk,
        attn_temperature_tuning=read.flag("attn_temperature_tuning", False),
        floor_scale=read.number("floor_scale", 8192.0),
        attn_scale=read.number("attn_scale", 0.1),
        tie_word_embeddings=False,
        max_position_embeddings=LONGEST_DENSE if moe is None else LONGEST_SCOUT if experts == 16 else LONGEST_MOE,
        bos_token_id=special + BEGIN_OF_TEXT if special > 0 else None,
        eos_token_ids=tuple(special + n for n in (END_OF_TEXT, END_OF_MESSAGE, END_OF_TURN)) if special > 0 else (),
        layers=_layers(read, moe, num_layers, chunk),
        multimodal=nested.get("vision_args") is not None,
    )


def _moe_args(read: TypedJson) -> TypedJson | None:
    value = read.data.get("moe_args")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise read.refuse("moe_args", "an object, or null for a dense model")
    return TypedJson(value, f"{read.where}: moe_args")


def _dense_width(read: TypedJson, hidden: int) -> int:
    """model.py, TransformerBlock: two thirds of 4 * dim, times the multiplier, up to a whole multiple."""
    width = int(2 * (4 * hidden) / 3)
    return _round_up(int(_factor(read, "ffn_dim_multiplier", 1.0) * width), read)


def _expert_width(read: TypedJson, moe: TypedJson, hidden: int) -> int:
    """model.py and moe.py: the same of ffn_exp * dim, shared by the shared expert and those a token visits."""
    width = int(2 * int(_factor(read, "ffn_exp", None) * hidden) / 3)
    width = int(_factor(read, "ffn_dim_multiplier", 1.0) * width)
    if moe.flag("auto_scale_F", True):
        width = int(width / (moe.number("capacity_factor", 1.0) + 1))
    return _round_up(width, read)


def _factor(read: TypedJson, key: str, default: float | None) -> float:
    value = read.number(key, default)
    if value > WIDEST:
        raise read.refuse(key, f"a factor of at most {WIDEST:.0f}")
    return value


def _round_up(width: int, read: TypedJson) -> int:
    multiple = read.integer("multiple_of", 256)
    return width + -width % max(multiple, 1)


def _rope_scaling(read: TypedJson) -> RopeScaling | None:
    if not read.flag("use_scaled_rope", False):
        return None
    return RopeScaling(
        factor=read.number("rope_scaling_factor", ROPE_SCALING_FACTOR),
        low_freq_factor=ROPE_LOW_FREQUENCY,
        high_freq_factor=read.number("rope_high_freq_factor", ROPE_HIGH_FREQUENCY),
        original_max_position_embeddings=ROPE_ORIGINAL_LENGTH,
    )


def _layers(read: TypedJson, moe: TypedJson | None, num_layers: int, chunk: int | None) -> tuple[LayerConfig, ...]:
    """model.py, TransformerBlock: every n-th layer is nope, every n-th a mixture of experts, both counted from 1."""
    nope_every = read.optional_integer("nope_layer_interval", None)
    moe_every = 0 if moe is None else moe.integer("interleave_moe_layer_step", 1)
    layers = []
    for number in range(1, num_layers + 1):
        rope = not nope_every or number % nope_every != 0
        layers.append(
            LayerConfig(
                rope=rope,
                moe=bool(moe_every) and number % moe_every == 0,
                kv_class="chunked" if rope and chunk else "global",
            )
        )
    return tuple(layers)
