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
def test_token_by_token_decode_equals_prefill(tiny_bundle: Bundle, target: str) -> None:
    """A prompt's logits one token at a time, through the same cache, across three chunk boundaries."""
    llm = LLM(tiny_bundle("scout", target, "fp32"))
    ids = random_ids(3 * CHUNK + 5, seed=2)
    whole = llm.score(ids)
    params = [SamplingParams(temperature=0, max_tokens=1, logprobs=20, ignore_eos=True)]
    for end in (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, len(ids)):
        (answer,) = llm.generate([ids[:end]], params)
        assert answer.token_ids[0] == int(whole[end - 1].argmax())
    # Forced decode: greedy continuation scored as one prefill gives the same tokens at every step.
    (answer,) = llm.generate([ids[:3]], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
    again = llm.score([*ids[:3], *answer.token_ids])
    assert again.argmax(-1)[2:-1].tolist() == list(answer.token_ids)


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
