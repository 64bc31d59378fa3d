"""The Llama 4 text decoder, top to bottom, in plain PyTorch: the numerics that every other form of the model must equal.

Letters in names: B batch, S new tokens, T = B*S, H hidden, N query heads, G key/value heads, D head dim, C cache rows,
E experts, K experts per token, I expert width, V vocabulary, R rows to compute logits for.

Two leaves are Llama 4's own and become custom ops when the model is exported: `ChunkedAttention` (rotation, qk norm,
temperature, cache, causal attention within the chunk) and `Experts` (the routed half of the mixture of experts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corral.spec.model_config import KvClass, LayerConfig, ModelConfig


@dataclass(frozen=True)
class Past:
    """Keys and values seen so far, of fixed capacity: each cache is [B, G, C, D], and `length_B[kv_class]` rows are full.

    Chunked layers hold only the current chunk, from row 0; global layers hold every token (architecture, "KV classes").
    """

    keys: Sequence[Tensor]  # one per layer
    values: Sequence[Tensor]
    length_B: Mapping[KvClass, Tensor]  # int64


@dataclass(frozen=True)
class Rotary:
    """What positions mean to the layers: rotation for rope layers, query temperature for nope layers."""

    cos_BSd: Tensor  # d = D / 2, one angle per interleaved pair
    sin_BSd: Tensor
    temperature_BS: Tensor | None


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Weightless RMS norm over the last dimension, computed in float32 (Zhang & Sennrich 2019, eq. 4)."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).type_as(x)


class RMSNorm(nn.Module):
    """RMS norm whose weight multiplies *after* the cast back, as Llama 4 does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps) * self.weight


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): the shared expert, and the whole feed-forward of a dense layer."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def route(logits_TE: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor, list[int]]:
    """All visits of tokens to their top-K experts, sorted by expert: each visit's token and gate, and visits by expert.

    The gate is sigmoid(router logit), in float32: it scales what the expert sees.
    """
    logits_TK, expert_TK = logits_TE.topk(num_experts_per_tok, dim=-1)
    by_expert = expert_TK.flatten().argsort(stable=True)
    visits = expert_TK.flatten().bincount(minlength=logits_TE.shape[-1]).tolist()
    return by_expert // num_experts_per_tok, torch.sigmoid(logits_TK.float()).flatten()[by_expert], visits


class Experts(nn.Module):
    """The routed experts: each token visits its top-K experts, which see the token scaled by sigmoid(router logit).

    `gate_up_proj` [E, H, 2I] holds the gate half first; `down_proj` is [E, I, H]. Only chosen experts compute.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.num_experts_per_tok = config.num_experts_per_tok
        self.gate_up_proj = nn.Parameter(torch.empty(experts, hidden, 2 * width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x: Tensor, router_logits: Tensor) -> Tensor:
        x_TH = x.flatten(0, -2)
        token, gate, visits = route(router_logits.flatten(0, -2), self.num_experts_per_tok)
        routed = x_TH[token] * gate[:, None].type_as(x)
        answers = [self._expert(e, mine) for e, mine in enumerate(routed.split(visits)) if len(mine)]
        return torch.zeros_like(x_TH).index_add(0, token, torch.cat(answers).type_as(x)).view_as(x)

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        return self.activated(expert, x) @ self.down_proj[expert]

    def activated(self, expert: int, x: Tensor) -> Tensor:
        """silu(x @ gate) * (x @ up): what an expert's second matrix sees."""
        gate, up = (x @ self.gate_up_proj[expert]).chunk(2, dim=-1)
        return F.silu(gate) * up


class MoE(nn.Module):
    """Mixture of experts: a shared expert for every token plus the routed ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = Experts(config)
        self.shared_expert = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.shared_expert(x_BSH) + self.experts(x_BSH, self.router(x_BSH))


def rotate(x_BSHD: Tensor, rotary: Rotary) -> Tensor:
    """Rotate interleaved pairs (x[2d], x[2d+1]) by the position's angle d (RoFormer eq. 34, real form)."""
    even, odd = x_BSHD.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary.cos_BSd[:, :, None], rotary.sin_BSd[:, :, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x_BSHD)


class ChunkedAttention(nn.Module):
    """Everything between the projections of one attention layer; `layer.rope` decides which of the two kinds it is."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.config, self.layer = config, layer

    def forward(
        self,
        query: Tensor,  # [B, S, N*D]
        key: Tensor,  # [B, S, G*D]
        value: Tensor,
        rotary: Rotary,
        positions_BS: Tensor,
        past_key: Tensor | None,  # [B, G, C, D]
        past_value: Tensor | None,
        past_length_B: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return (output [B, S, N*D], present key, present value).

        With a cache, new token s of row b goes to cache row `past_length_B[b] + s` and sees rows up to its own; the
        caller never lets the S tokens of a chunked layer cross a chunk boundary. Without a cache (None), the mask is
        taken from the positions, chunk included: that is the definition the cached form must equal.
        """
        head_dim = self.config.head_dim
        query, key, value = (t.unflatten(-1, (-1, head_dim)) for t in (query, key, value))
        if self.layer.rope:
            query, key = rotate(query, rotary), rotate(key, rotary)
            if self.config.use_qk_norm:
                query, key = rms_norm(query, self.config.rms_norm_eps), rms_norm(key, self.config.rms_norm_eps)
        elif rotary.temperature_BS is not None:
            query = (query * rotary.temperature_BS[:, :, None, None]).type_as(query)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        if past_key is None or past_value is None or past_length_B is None:
            mask = self._visible_by_position(positions_BS)
        else:
            row_BS = past_length_B[:, None] + torch.arange(query.shape[2], device=query.device)
            index = row_BS[:, None, :, None].expand_as(key)
            key, value = past_key.scatter(2, index, key), past_value.scatter(2, index, value)
            mask = torch.arange(key.shape[2], device=key.device) <= row_BS[:, None, :, None]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        out = out.transpose(1, 2).flatten(2)
        return (out, None, None) if past_key is None else (out, key, value)

    def _visible_by_position(self, positions_BS: Tensor) -> Tensor:
        query, key = positions_BS[:, None, :, None], positions_BS[:, None, None, :]
        visible = key <= query
        chunk = self.config.attention_chunk_size
        if self.layer.kv_class == "chunked" and chunk:
            visible = visible & (key // chunk == query // chunk)
        return visible


def pick_rows(x_BSH: Tensor, rows_BR: Tensor | None) -> Tensor:
    """The tokens [B, R, H] that `rows_BR` points to; all of them where it is None."""
    return x_BSH if rows_BR is None else x_BSH.gather(1, rows_BR[..., None].expand(-1, -1, x_BSH.shape[-1]))


class Attention(nn.Module):
    """Grouped-query attention: projections around `ChunkedAttention`."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.q_proj = nn.Linear(config.hidden_size, config.query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_size, bias=False)
        self.o_proj = nn.Linear(config.query_size, config.hidden_size, bias=False)
        self.core = ChunkedAttention(config, layer)

    def forward(
        self,
        x_BSH: Tensor,
        rotary: Rotary,
        positions_BS: Tensor,
        past_key: Tensor | None,
        past_value: Tensor | None,
        past_length_B: Tensor | None,
        rows_BR: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        query, key, value = self.q_proj(x_BSH), self.k_proj(x_BSH), self.v_proj(x_BSH)
        out, key, value = self.core(query, key, value, rotary, positions_BS, past_key, past_value, past_length_B)
        return self.o_proj(pick_rows(out, rows_BR)), key, value


class DecoderLayer(nn.Module):
    """One residual block: attention, then MoE or a dense MLP, as `layer` says.

    `rows_BR` are the tokens to answer for: all are attended to, and what comes after attention is computed for these alone.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = MoE(config) if layer.moe else MLP(config.hidden_size, config.intermediate_size_mlp)

    def forward(
        self,
        x_BSH: Tensor,
        rotary: Rotary,
        positions_BS: Tensor,
        past_key: Tensor | None,
        past_value: Tensor | None,
        past_length_B: Tensor | None,
        rows_BR: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        attended, key, value = self.self_attn(
            self.input_layernorm(x_BSH), rotary, positions_BS, past_key, past_value, past_length_B, rows_BR
        )
        x_BRH = pick_rows(x_BSH, rows_BR) + attended
        return x_BRH + self.feed_forward(self.post_attention_layernorm(x_BRH)), key, value


class Llama4Text(nn.Module):
    """The decoder from embeddings to logits. Parameter names are Hugging Face's without the leading `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def rotary(self, positions_BS: Tensor) -> Rotary:
        """Angles position * frequency, in float32 as the reference computes them, and Scalable-Softmax temperature.

        Temperature (arXiv 2501.19399, as in Llama 4): log1p(floor((position + 1) / floor_scale)) * attn_scale + 1.
        """
        frequencies = torch.tensor(self.config.inverse_frequencies(), dtype=torch.float32, device=positions_BS.device)
        position = positions_BS.float()
        angle = position[..., None] * frequencies
        temperature = None
        if self.config.attn_temperature_tuning:
            octave = torch.floor((position + 1.0) / self.config.floor_scale)
            temperature = torch.log1p(octave) * self.config.attn_scale + 1.0
        return Rotary(angle.cos(), angle.sin(), temperature)

    def forward(
        self,
        embeddings_BSH: Tensor,
        positions_BS: Tensor,  # int64, absolute
        logit_rows_BR: Tensor | None = None,  # int64 indices into S; None: all
        past: Past | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return (logits [B, R, V], present keys, present values); the presents are empty without a `past`.

        Only the last layer's tokens that logits are computed of go through its feed-forward: a prompt asks for one.
        """
        rotary = self.rotary(positions_BS)
        x_BSH, keys, values = embeddings_BSH, [], []
        for i, (layer, facts) in enumerate(zip(self.layers, self.config.layers, strict=True)):
            cache = (past.keys[i], past.values[i], past.length_B[facts.kv_class]) if past else (None, None, None)
            rows_BR = logit_rows_BR if i == len(self.layers) - 1 else None
            x_BSH, key, value = layer(x_BSH, rotary, positions_BS, *cache, rows_BR)
            if past:
                keys.append(key)
                values.append(value)
        return self.lm_head(self.norm(x_BSH)), keys, values

    def logits(self, token_ids_BS: Tensor) -> Tensor:
        """Teacher-forced logits [B, S, V] of whole sequences that start at position 0."""
        positions_BS = torch.arange(token_ids_BS.shape[1], device=token_ids_BS.device).expand_as(token_ids_BS)
        return self(self.embed_tokens(token_ids_BS), positions_BS)[0]
