"""Compiled float bundles against transformers' Llama 4: prefill, decode across chunk boundaries, batches, greedy text."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Llama4ForCausalLM

from corral.runtime import LLM, SamplingParams
from corral.runtime.embedding import EmbeddingTable
from corral.runtime.kv_cache import KvCache
from corral.runtime.onnxruntime_session import OnnxRuntimeSession
from corral.runtime.session import Step
from corral.spec.bundle import open_bundle

CHUNK = 16
FORMS = ["scout", "maverick", "guard", "topk2"]
TARGETS = ["portable", "cpu"]
TOLERANCE = 1e-4  # of the logits' scale; about 1e-6 is seen
Bundle = Callable[[str, str, str], Path]
Checkpoint = Callable[[str], Path]


@cache
def transformers_model(directory: Path) -> Any:
    # "eager": its masks are chunked; decode below always recomputes the whole sequence, never its own cache
    return Llama4ForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()


def transformers_logits(directory: Path, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return transformers_model(directory)(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def random_ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < TOLERANCE, f"off by {error:.1e} of the logits' scale"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_prompt_logits_equal(tiny_checkpoint: Checkpoint, tiny_bundle: Bundle, form: str, target: str) -> None:
    llm = LLM(tiny_bundle(form, target, "fp32"))
    for length in (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5):
        ids = random_ids(length)
        assert_close(llm.score(ids), transformers_logits(tiny_checkpoint(form), ids))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_greedy_text_is_equal_for_200_tokens(
    tiny_checkpoint: Checkpoint, tiny_bundle: Bundle, form: str, target: str
) -> None:
    """Every generated token is the reference's choice given all before it: 13 chunk boundaries are decoded across.

    One reference pass over prompt and answer checks all 200: position i's argmax must be token i + 1.
    """
    prompt = random_ids(5, seed=1)
    (answer,) = LLM(tiny_bundle(form, target, "fp32")).generate(
        [prompt], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    )
    ids = [*prompt, *answer.token_ids]
    assert len(answer.token_ids) == 200
    choices = transformers_logits(tiny_checkpoint(form), ids).argmax(-1)[len(prompt) - 1 : -1]
    assert choices.tolist() == list(answer.token_ids)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_token_by_token_decode_equals_prefill(
    tiny_checkpoint: Checkpoint, tiny_bundle: Bundle, form: str, target: str
) -> None:
    """One token at a time through the shared caches, across three chunk boundaries: the logits of one whole pass."""
    bundle = open_bundle(tiny_bundle(form, target, "fp32"))
    ids = random_ids(3 * CHUNK + 5, seed=2)
    session, embed, cache = OnnxRuntimeSession(bundle), EmbeddingTable(bundle), KvCache(bundle.manifest.kv, 4096)
    cache.reserve(1, len(ids))
    steps = [
        session.run(
            Step(
                embeddings_BSH=embed([token])[None],
                positions_BS=np.array([[position]]),
                logit_rows_BR=np.zeros((1, 1), np.int64),
                past_length_B=cache.past_lengths([position]),
                caches=cache.slot(0),
            )
        )[0, 0].copy()  # the next step overwrites it
        for position, token in enumerate(ids)
    ]
    assert_close(np.stack(steps), LLM(bundle).score(ids))
    assert_close(np.stack(steps), transformers_logits(tiny_checkpoint(form), ids))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_batched_rows_at_different_positions_equal_single_rows(tiny_bundle: Bundle, target: str, weights: str) -> None:
    """Prompts that end just before, at and after chunk boundaries, decoded together: each as if it were alone."""
    llm = LLM(tiny_bundle("scout", target, weights))
    prompts = [random_ids(n, seed=n) for n in (1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 2, 2 * CHUNK + 5)]
    params = SamplingParams(temperature=0, max_tokens=2 * CHUNK + 3, ignore_eos=True)
    together = [answer.token_ids for answer in llm.generate(prompts, params)]
    alone = [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
    assert together == alone
