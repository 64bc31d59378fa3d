"""`corral::RopeAttention`, `corral::NopeAttention`: all of a Llama 4 attention layer between its projections, cache included.

    (output, present_key, present_value) = RopeAttention(query, key, value, past_key, past_value, past_length, cos, sin)
    (output, present_key, present_value) = NopeAttention(query, key, value, past_key, past_value, past_length, temperature?)

| name                 | type    | shape                | meaning                                                 |
| -------------------- | ------- | -------------------- | ------------------------------------------------------- |
| query                | T       | [B, S, heads * D]    | projected, neither rotated nor normed                   |
| key, value           | T       | [B, S, kv heads * D] |                                                         |
| past_key, past_value | T       | [B, kv heads, C, D]  | caches of fixed capacity C                              |
| past_length          | int64   | [B]                  | cache rows already filled                               |
| cos, sin             | float32 | [B, S, D / 2]        | rotation of interleaved pairs                           |
| temperature          | float32 | [B, S]               | multiplies the queries, where the model tunes it        |
| output               | T       | [B, S, heads * D]    |                                                         |
| present_key/value    | T       | as past              | with the new rows written at past_length                |

Attributes: `num_heads`, `kv_num_heads`, `chunk_size` (0: a global layer), and for RopeAttention `qk_norm_epsilon` (0: no
weightless RMS norm of q and k after the rotation). New token s sees the cache rows up to past_length + s: with the chunked
class's caches, which restart at each chunk boundary, that is Llama 4's chunked attention.

They are two operators because ONNX's reference evaluator tells functions apart by name only, and within one model all
layers of a kind have the same body.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from corral.exporter.ops.custom_op import DOMAIN, VERSION, CustomOp, parse_body
from corral.model.text import ChunkedAttention, Rotary
from corral.spec.model_config import ModelConfig

ROPE, NOPE = "RopeAttention", "NopeAttention"
CACHE_INPUTS = "past_key, past_value, past_length"
ATTRIBUTES = "num_heads, kv_num_heads, chunk_size"


class AttentionNode(nn.Module):
    """Stands in for the model's `ChunkedAttention` while capturing: same call, one node."""

    def __init__(self, leaf: ChunkedAttention) -> None:
        super().__init__()
        self.config, self.layer = leaf.config, leaf.layer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: Rotary,
        positions_BS: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        past_length_B: Tensor,
    ) -> tuple[Tensor, ...]:
        config, rope = self.config, self.layer.rope
        attributes: dict[str, Any] = {
            "num_heads": config.num_attention_heads,
            "kv_num_heads": config.num_key_value_heads,
            "chunk_size": (config.attention_chunk_size or 0) if self.layer.kv_class == "chunked" else 0,
        }
        extra = [] if rotary.temperature_BS is None else [rotary.temperature_BS]
        if rope:
            extra = [rotary.cos_BSd, rotary.sin_BSd]
            attributes["qk_norm_epsilon"] = config.rms_norm_eps if config.use_qk_norm else 0.0
        return tuple(
            torch.onnx.ops.symbolic_multi_out(
                f"{DOMAIN}::{ROPE if rope else NOPE}",
                [query, key, value, past_key, past_value, past_length_B, *extra],
                attrs=attributes,
                dtypes=[query.dtype, past_key.dtype, past_value.dtype],
                shapes=[query.shape, past_key.shape, past_value.shape],
                version=VERSION,
            )
        )


def bodies(config: ModelConfig) -> list[ir.Function]:
    """The fallback bodies of the operators that this model's layers use, in standard operators."""
    kinds = {layer.rope for layer in config.layers}
    return [body(config) for rope, body in ((True, _rope_body), (False, _nope_body)) if rope in kinds]


def _rope_body(config: ModelConfig) -> ir.Function:
    lines = [f"{x}_rotated = RotaryEmbedding <interleaved = 1> ({x}_BNSD, cos, sin)" for x in ("query", "key")]
    query, key = "query_rotated", "key_rotated"
    if config.use_qk_norm:
        ones = ", ".join(["1.0"] * config.head_dim)
        norm = "RMSNormalization <axis = -1, epsilon: float = @qk_norm_epsilon>"
        lines.append(f"ones = Constant <value_floats = [{ones}]> ()")
        lines += [f"{x}_normed = {norm} ({x}_rotated, ones)" for x in ("query", "key")]
        query, key = "query_normed", "key_normed"
    inputs = f"query, key, value, {CACHE_INPUTS}, cos, sin"
    return _body(config, ROPE, f"<{ATTRIBUTES}, qk_norm_epsilon>({inputs})", lines, query, key)


def _nope_body(config: ModelConfig) -> ir.Function:
    inputs = f"query, key, value, {CACHE_INPUTS}"
    if not config.attn_temperature_tuning:
        return _body(config, NOPE, f"<{ATTRIBUTES}>({inputs})", [], "query_BNSD", "key_BNSD")
    lines = [
        "head_axes = Constant <value_ints = [1, 3]> ()",
        "temperature_B1S1 = Unsqueeze (temperature, head_axes)",
        "query_scaled = Mul (query_BNSD, temperature_B1S1)",
    ]
    return _body(config, NOPE, f"<{ATTRIBUTES}>({inputs}, temperature)", lines, "query_scaled", "key_BNSD")


def _body(
    config: ModelConfig, name: str, signature: str, position_lines: list[str], query: str, key: str
) -> ir.Function:
    """What both kinds share, around the lines that make `query` and `key` of `query_BNSD` and `key_BNSD`."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    lines = [
        f"q_shape = Constant <value_ints = [0, 0, {heads}, {dim}]> ()",
        f"kv_shape = Constant <value_ints = [0, 0, {kv_heads}, {dim}]> ()",
        "flat_shape = Constant <value_ints = [0, 0, -1]> ()",
        *_split_heads("query", "q_shape"),
        *_split_heads("key", "kv_shape"),
        *_split_heads("value", "kv_shape"),
        *position_lines,
        f"present_key = TensorScatter <axis = 2> (past_key, {key}, past_length)",
        "present_value = TensorScatter <axis = 2> (past_value, value_BNSD, past_length)",
        *_visible_rows(),
        f"output_BNSD = Attention ({query}, present_key, present_value, visible)",
        "output_BSND = Transpose <perm = [0, 2, 1, 3]> (output_BNSD)",
        "output = Reshape (output_BSND, flat_shape)",
    ]
    return parse_body(name, f"{signature} => (output, present_key, present_value)", "\n".join(lines))


def _split_heads(x: str, shape: str) -> list[str]:
    return [f"{x}_BSND = Reshape ({x}, {shape})", f"{x}_BNSD = Transpose <perm = [0, 2, 1, 3]> ({x}_BSND)"]


def _visible_rows() -> list[str]:
    """visible [B, 1, S, C]: cache row c <= past_length[b] + s."""
    return [
        "zero = Constant <value_int = 0> ()",
        "one = Constant <value_int = 1> ()",
        "one_axis = Constant <value_ints = [1]> ()",
        "front_axes = Constant <value_ints = [1, 2, 3]> ()",
        "num_tokens_1d = Shape <start = 1, end = 2> (query)",
        "num_tokens = Squeeze (num_tokens_1d)",
        "capacity_1d = Shape <start = 2, end = 3> (past_key)",
        "capacity = Squeeze (capacity_1d)",
        "token = Range (zero, num_tokens, one)",
        "token_column = Unsqueeze (token, one_axis)",
        "length_4d = Unsqueeze (past_length, front_axes)",
        "own_row = Add (length_4d, token_column)",
        "row = Range (zero, capacity, one)",
        "visible = LessOrEqual (row, own_row)",
    ]


OP = CustomOp(leaf=ChunkedAttention, node=AttentionNode, bodies=bodies)
