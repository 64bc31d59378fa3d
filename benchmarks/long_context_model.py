"""A small model for very long contexts, and what its logits must be after any token of a text.

Four layers of one head, chunks of 8192 tokens as the published models have. `nope` has their pattern, three rope layers and
a nope layer; `rope` has rope layers only, to tell what these alone cost. Weights are random. The nope layer's queries are
larger than a fan-in would make them, or a sum over a million random rows would come to nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corral.graphs import compile
from corral.model.checkpoint import open_checkpoint
from corral.model.checkpoint.reference import load_reference
from corral.model.checkpoint.synthetic import open_synthetic
from corral.spec.presets import SCALED_ROPE, Preset
from corral.spec.recipe import Recipe
from corral.spec.rule import Rule

QUERY_GAIN = 2.0
MODELS = {"rope": [1, 1, 1, 1], "nope": [1, 1, 1, 0]}  # as `no_rope_layers` has them: 1 is a rope layer
CONFIG = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size_mlp": 128, "num_hidden_layers": 4, "head_dim": 32,
    "num_attention_heads": 1, "num_key_value_heads": 1, "num_local_experts": 0, "moe_layers": [],
    "rope_scaling": SCALED_ROPE, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def checkpoint_of(model: str, directory: Path) -> Path:
    """The checkpoint of one of MODELS, written unless it is there."""
    from safetensors.torch import save_file

    out = directory / model
    if (out / "config.json").exists():
        return out
    preset = Preset(name=model, title=model, config=CONFIG | {"no_rope_layers": MODELS[model]}, dtype="float32")
    store = open_synthetic(preset, model)
    tensors = {name: store.read_slice(name, ()).float().contiguous() for name in store.tensors}
    for name in tensors:
        if any(not rope and f"layers.{i}.self_attn.q_proj" in name for i, rope in enumerate(MODELS[model])):
            tensors[name] *= QUERY_GAIN
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(preset.config_json))
    return out


def bundle_of(model: str, kv: str, directory: Path) -> Path:
    """A bundle of corral's own attention over caches of type `kv`, compiled unless it is there.

    Its weights are float32, so that nothing but the caches may differ from the reference.
    """
    out = directory / f"{model}-{kv}"
    if not (out / "manifest.json").exists():
        recipe = Recipe(weights="int8", kernels="corral", kv=kv, rules=(Rule(matrices="*", weights="fp32"),))
        compile(checkpoint_of(model, directory), out, recipe)
    return out


class ChunkRows(NamedTuple):
    """What the tokens of one chunk are after the rope layers, and the nope layer's keys and values of them."""

    hidden_TH: Tensor
    key_TD: Tensor
    value_TD: Tensor


class Reference:
    """Logits from the PyTorch model, without a cache and in any order of tokens.

    A rope layer sees its own chunk only, and the nope layer is the last one: chunks are computed one by one, each whole, and
    the nope layer only for the tokens asked for, over the keys and values of all before them, with sums in float64.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._model = load_reference(open_checkpoint(checkpoint))
        config = self._model.config
        kinds = [layer.rope for layer in config.layers]
        assert all(kinds[:-1]), "only the last layer may see everything"
        self._rope = [layer for layer, rope in zip(self._model.layers, kinds, strict=True) if rope]
        self._nope = None if kinds[-1] else self._model.layers[-1]
        self._chunk = config.attention_chunk_size or 1
        self._scale = 1 / math.sqrt(config.head_dim)
        self._chunks: dict[tuple[int, bytes], ChunkRows] = {}

    @torch.inference_mode()
    def logits(self, ids: NDArray[np.int64], positions: Sequence[int], first_seen: int = 0) -> NDArray[np.float32]:
        """[positions, V]: what follows `ids[: position + 1]`.

        With `first_seen`, the nope layer sees nothing before it: this tells how much depends on what comes before.
        """
        hidden = torch.stack([self._hidden(ids, position, first_seen) for position in positions])
        logits: NDArray[np.float32] = self._model.lm_head(self._model.norm(hidden)).numpy()
        return logits

    def _hidden(self, ids: NDArray[np.int64], position: int, first_seen: int) -> Tensor:
        start = position - position % self._chunk
        x_H = self._rows(ids, start).hidden_TH[position - start]
        if self._nope is None:
            return x_H
        before = [self._rows(ids, first) for first in range(0, position + 1, self._chunk)]
        seen = slice(first_seen, position + 1)
        key_TD, value_TD = (torch.cat([rows[i] for rows in before])[seen].double() for i in (1, 2))
        temperature = self._model.rotary(torch.tensor([[position]])).temperature_BS
        assert temperature is not None
        attention = self._nope.self_attn
        query_D = attention.q_proj(self._nope.input_layernorm(x_H)).double() * temperature.double()[0]
        weights_T = (self._scale * key_TD @ query_D).softmax(0)
        x_H = x_H + attention.o_proj((weights_T @ value_TD).float())
        out: Tensor = x_H + self._nope.feed_forward(self._nope.post_attention_layernorm(x_H))
        return out

    def _rows(self, ids: NDArray[np.int64], start: int) -> ChunkRows:
        chunk = np.ascontiguousarray(ids[start : start + self._chunk])
        key = (start, chunk.tobytes())
        if key not in self._chunks:
            positions_BS = torch.arange(start, start + len(chunk))[None]
            x_BSH, rotary = self._model.embed_tokens(torch.from_numpy(chunk)[None]), self._model.rotary(positions_BS)
            for layer in self._rope:
                x_BSH = layer(x_BSH, rotary, positions_BS, None, None, None)[0]
            rows = x_BSH[0]
            if self._nope is None:
                self._chunks[key] = ChunkRows(rows, rows[:0], rows[:0])
            else:
                attention, normed = self._nope.self_attn, self._nope.input_layernorm(rows)
                self._chunks[key] = ChunkRows(rows, attention.k_proj(normed), attention.v_proj(normed))
        return self._chunks[key]
