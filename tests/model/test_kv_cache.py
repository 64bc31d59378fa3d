"""The cached forward equals the whole-sequence forward, however the sequence is cut and the rows are batched."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from corral.model.text import Llama4Text, Past
from corral.spec.kv_layout import split_at_chunks

CHUNK = 16
CAPACITY = 64
TOLERANCE = 1e-5  # of the largest logit
FORMS = ["scout", "maverick", "guard", "topk2"]


def empty_past(model: Llama4Text, batch: int) -> Past:
    """Caches full of rubbish: rows that are not filled must not matter."""
    config, generator = model.config, torch.Generator().manual_seed(3)
    rows = [CHUNK if layer.kv_class == "chunked" else CAPACITY for layer in config.layers]
    shapes = [(batch, config.num_key_value_heads, n, config.head_dim) for n in rows]
    keys, values = ([torch.randn(s, generator=generator) * 100 for s in shapes] for _ in "kv")
    return Past(keys=keys, values=values, length_B={})


def advance(model: Llama4Text, tokens_BS: Tensor, start_B: list[int], past: Past) -> tuple[Tensor, Past]:
    """Append `tokens_BS`, row b at position `start_B[b]`."""
    start = torch.tensor(start_B)
    positions_BS = start[:, None] + torch.arange(tokens_BS.shape[1])
    past = Past(keys=past.keys, values=past.values, length_B={"chunked": start % CHUNK, "global": start})
    logits, keys, values = model(model.embed_tokens(tokens_BS), positions_BS, past=past)
    return logits, Past(keys=keys, values=values, length_B={})


def in_pieces(model: Llama4Text, tokens: Tensor, pieces: list[tuple[int, int]]) -> tuple[Tensor, Past]:
    past, logits = empty_past(model, 1), []
    for start, length in pieces:
        piece, past = advance(model, tokens[:, start : start + length], [start], past)
        logits.append(piece)
    return torch.cat(logits, dim=1), past


def assert_same(got: Tensor, expected: Tensor) -> None:
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE, f"differs by {error:.1e} of the largest logit"


def random_tokens(length: int, seed: int = 4) -> Tensor:
    return torch.randint(0, 320, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMS)
def test_token_by_token(form: str, reference: Callable[[str], Any]) -> None:
    tokens = random_tokens(2 * CHUNK + 3)
    logits, _ = in_pieces(reference(form), tokens, [(i, 1) for i in range(tokens.shape[1])])
    assert_same(logits, reference(form).logits(tokens))


@pytest.mark.parametrize("form", FORMS)
def test_prefill_by_chunk(form: str, reference: Callable[[str], Any]) -> None:
    tokens = random_tokens(3 * CHUNK + 5)
    logits, _ = in_pieces(reference(form), tokens, split_at_chunks(0, tokens.shape[1], CHUNK))
    assert_same(logits, reference(form).logits(tokens))


@settings(deadline=None, max_examples=25)
@given(cuts=st.sets(st.integers(1, 3 * CHUNK + 4), max_size=6), seed=st.integers(0, 99))
@example(cuts=set(), seed=0)
@example(cuts={CHUNK - 1, CHUNK + 1}, seed=0)
def test_any_split_equals_the_whole(reference: Callable[[str], Any], cuts: set[int], seed: int) -> None:
    tokens = random_tokens(3 * CHUNK + 5, seed)
    edges = [0, *sorted(cuts), tokens.shape[1]]
    pieces = [p for start, end in pairwise(edges) for p in split_at_chunks(start, end - start, CHUNK)]
    logits, _ = in_pieces(reference("scout"), tokens, pieces)
    assert_same(logits, reference("scout").logits(tokens))


@pytest.mark.parametrize("form", FORMS)
def test_rows_at_different_positions(form: str, reference: Callable[[str], Any]) -> None:
    """Rows before, at and past a boundary step together, and each equals itself alone."""
    model, step = reference(form), 2
    starts = [0, 5, CHUNK - step, CHUNK, 2 * CHUNK + 1]
    sequences = [random_tokens(start + step, seed=start) for start in starts]
    pasts = [in_pieces(model, s[:, :-step], split_at_chunks(0, start, CHUNK))[1] if start else empty_past(model, 1)
             for s, start in zip(sequences, starts, strict=True)]  # fmt: skip
    together = Past(
        keys=[torch.cat(rows) for rows in zip(*(p.keys for p in pasts), strict=True)],
        values=[torch.cat(rows) for rows in zip(*(p.values for p in pasts), strict=True)],
        length_B={},
    )
    logits, _ = advance(model, torch.cat([s[:, -step:] for s in sequences]), starts, together)
    for row, sequence in enumerate(sequences):
        assert_same(logits[row], model.logits(sequence)[0, -step:])


def test_logit_rows_pick_tokens(reference: Callable[[str], Any]) -> None:
    model, tokens = reference("scout"), torch.cat([random_tokens(7, 5), random_tokens(7, 6)])
    rows = torch.tensor([[6, 0], [2, 2]])
    positions = torch.arange(7).expand(2, 7)
    got = model(model.embed_tokens(tokens), positions, rows)[0]
    every = model.logits(tokens)
    assert_same(got, torch.stack([every[0, [6, 0]], every[1, [2, 2]]]))


def test_the_last_layer_computes_picked_tokens_only(reference: Callable[[str], Any]) -> None:
    model, tokens = reference("scout"), random_tokens(7, 5)
    seen: list[int] = []
    hooks = [
        layer.feed_forward.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
        for layer in model.layers
    ]
    model(model.embed_tokens(tokens), torch.arange(7)[None], torch.tensor([[6]]))
    for hook in hooks:
        hook.remove()
    assert seen == [7] * (len(model.layers) - 1) + [1]
