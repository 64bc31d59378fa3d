"""One token at position ten million, on caches of which a thousand rows differ and all others are alike.

The other rows are zeros that were never written, so that caches of gigabytes take no memory; to the reference they are one
row that counts as many.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from corral.graphs import compile
from corral.model.checkpoint.open import open_checkpoint
from corral.model.checkpoint.reference import load_reference
from corral.model.text import ChunkedAttention, Llama4Text, Past, Rotary
from corral.runtime.embedding import EmbeddingTable
from corral.runtime.forward import forward
from corral.runtime.onnxruntime_session import OnnxRuntimeSession
from corral.spec.recipe import Recipe

POSITION = 10_000_001
SEEN = 1000
TOKEN = 77


class FewRows(ChunkedAttention):
    """A nope layer's attention; the last row of the past is there as often as makes POSITION rows in all."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: Rotary,
        positions_BS: Tensor,
        past_key: Tensor | None,
        past_value: Tensor | None,
        past_length_B: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        assert past_key is not None and past_value is not None and rotary.temperature_BS is not None
        query, key, value = (t.unflatten(-1, (-1, self.config.head_dim)) for t in (query, key, value))
        query = (query * rotary.temperature_BS[:, :, None, None]).transpose(1, 2)
        keys, values = torch.cat([past_key, key.transpose(1, 2)], 2), torch.cat([past_value, value.transpose(1, 2)], 2)
        more = torch.zeros(1, keys.shape[2])
        more[0, -2] = math.log(POSITION - SEEN)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=more, enable_gqa=True)
        return out.transpose(1, 2).flatten(2), None, None


@pytest.fixture(scope="module")
def checkpoint(tiny_config: Callable[[str], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = tiny_config("scout") | {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}
    config |= {"max_position_embeddings": 1 << 24, "num_key_value_heads": 1}
    directory = tmp_path_factory.mktemp("far")
    torch.manual_seed(0)
    Llama4ForCausalLM(Llama4TextConfig(**config)).save_pretrained(directory)
    return directory


def rows(model: Llama4Text) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Keys and values [1 + SEEN, head dim]: the row before in the chunk, then what the nope layer saw.

    Scores are about as large as the logarithm of POSITION, so that neither few nor many rows decide alone.
    """
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 1 + SEEN, model.config.head_dim)).astype(np.float32)
    return 60 * keys, values


def true_logits(model: Llama4Text, keys: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    for module in model.modules():
        if isinstance(module, ChunkedAttention) and not module.layer.rope:
            module.__class__ = FewRows

    def cache(these: np.ndarray[Any, Any], zeros: int) -> Tensor:
        return torch.from_numpy(np.pad(these, ((0, zeros), (0, 0))))[None, None]

    past = Past(
        keys=[cache(keys[:1], 1), cache(keys[1:], 1)],
        values=[cache(values[:1], 1), cache(values[1:], 1)],
        length_B={"chunked": torch.tensor([POSITION % 16]), "global": torch.tensor([SEEN])},
    )
    ids = torch.tensor([[TOKEN]])
    logits: np.ndarray[Any, Any] = model(model.embed_tokens(ids), torch.tensor([[POSITION]]), None, past)[0][
        0, 0
    ].numpy()
    return logits


@pytest.mark.parametrize(("weights", "kernels", "tolerance"), [("fp32", "stock", 2e-5), ("int8", "corral", 0.03)])
def test_a_token_at_position_ten_million(
    checkpoint: Path, tmp_path: Path, weights: str, kernels: str, tolerance: float, request: pytest.FixtureRequest
) -> None:
    if kernels == "corral":
        request.getfixturevalue("cpu_kernels")
    model = load_reference(open_checkpoint(checkpoint))
    keys, values = rows(model)
    want = true_logits(model, keys, values)
    bundle = compile(checkpoint, tmp_path / "out", Recipe(weights=weights, kernels=kernels, group_size=32))
    session = OnnxRuntimeSession(bundle, threads=1)
    caches = session.new_caches(bundle.manifest.kv, 1 << 24)
    caches.reserve(1, POSITION + 1)
    view = caches.slot(0)
    where = np.random.default_rng(1).choice(POSITION, SEEN, replace=False)
    for array, own in ((view.keys, keys), (view.values, values)):
        array[0][0, 0, 0] = own[0]
        array[1][0, 0, where] = own[1:]
    got = forward(session, EmbeddingTable(bundle), caches, view, [[TOKEN]], [POSITION], [[0]])[0, 0]
    scale = np.abs(want).max()
    assert np.abs(got - want).max() < tolerance * scale
    # What is compared must depend on the rows that were seen, and on how many others there are.
    assert np.abs(want - true_logits(model, 0 * keys, values)).max() > 2 * tolerance * scale
    assert np.abs(want - true_logits(model, keys, 0 * values)).max() > 2 * tolerance * scale
