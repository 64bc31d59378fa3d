"""Guessed tokens and kept rows with compiled bundles: the answers of plain decoding, on both CPU targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from corral.runtime import LLM, SamplingParams
from corral.runtime.kv_cache import KvCache
from corral.runtime.prefix_cache import PrefixCache
from corral.runtime.session import Float32, Step

CHUNK = 16
PARAMS = SamplingParams(temperature=0, max_tokens=2 * CHUNK + 3, ignore_eos=True)
TinyBundle = Callable[..., Path]


def prompts() -> list[list[int]]:
    """Around chunk boundaries, with a common beginning."""
    ids = np.random.default_rng(3).integers(0, 8, 3 * CHUNK).tolist()
    return [[*ids[:n], 9] for n in (1, CHUNK - 2, CHUNK - 1, CHUNK, 2 * CHUNK + 5)]


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("guess", ["lookup", "draft"])
def test_guessed_tokens_change_no_answer(tiny_bundle: TinyBundle, target: str, guess: str) -> None:
    bundle, draft = tiny_bundle("scout", target, "fp32"), tiny_bundle("scout", target, "int4")
    guessing = LLM(bundle, prompt_lookup=True) if guess == "lookup" else LLM(bundle, draft=draft)
    plain = [answer.token_ids for answer in LLM(bundle).generate(prompts(), PARAMS)]
    assert [guessing.generate([prompt], PARAMS)[0].token_ids for prompt in prompts()] == plain
    assert [answer.token_ids for answer in guessing.generate(prompts(), PARAMS)] == plain


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_prompts_that_begin_alike_are_answered_as_without(tiny_bundle: TinyBundle, target: str, tmp_path: Path) -> None:
    bundle = tiny_bundle("scout", target, "fp32")
    plain = [answer.token_ids for answer in LLM(bundle).generate(prompts(), PARAMS)]
    llm = LLM(bundle, prefix_cache_gb=0.1)
    for _ in range(2):
        answers = [llm.generate([prompt], PARAMS)[0] for prompt in prompts()]
        assert [answer.token_ids for answer in answers] == plain
    assert [answer.timings.cached_tokens for answer in answers] == [0, 0, 0, CHUNK, 2 * CHUNK]
    assert llm.save_prefix(prompts()[-1], tmp_path / "prefix") == 2 * CHUNK
    other = LLM(bundle, prefix_cache_gb=0.1)
    other.load_prefix(tmp_path / "prefix")
    [answer] = other.generate([prompts()[-1]], PARAMS)
    assert (answer.token_ids, answer.timings.cached_tokens) == (plain[-1], 2 * CHUNK)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("kv", ["float", "int8", "int4"])
def test_rows_that_were_kept_give_the_same_bits_whatever_they_hold(
    tiny_bundle: TinyBundle, kv: str, tmp_path: Path
) -> None:
    """Rows are copied as they lie in the cache, and no kernel's sum depends on how a prompt was cut into steps."""
    bundle = tiny_bundle("scout", "cpu", "int4", "corral", kv)
    params = dataclasses.replace(PARAMS, logprobs=1 << 20)  # of every token: as good as the logits

    def opened(prefix_cache_gb: float = 0) -> LLM:
        llm = LLM(bundle, prefix_cache_gb=prefix_cache_gb)
        engine, layouts = llm._engine, llm.bundle.manifest.kv
        assert isinstance(engine._cache, KvCache)
        if prefix_cache_gb:  # blocks that end amid chunks, too
            engine._prefixes = PrefixCache(engine._cache, layouts, 1 << 24, block_tokens=4)
        return llm

    plain, keeping, loading = opened(), opened(prefix_cache_gb=0.1), opened(prefix_cache_gb=0.1)
    for prompt in prompts():
        [want] = plain.generate([prompt], params)
        for cached in (False, True):
            [got] = keeping.generate([prompt], params)
            assert (got.token_ids, got.logprobs) == (want.token_ids, want.logprobs)
            assert not cached or got.timings.cached_tokens == (len(prompt) - 1) // 4 * 4
    assert keeping.save_prefix(prompts()[-1], tmp_path / "prefix") == loading.load_prefix(tmp_path / "prefix")
    [got] = loading.generate([prompts()[-1]], params)
    assert (got.token_ids, got.logprobs) == (want.token_ids, want.logprobs)
    assert got.timings.cached_tokens == 2 * CHUNK + 4


@pytest.mark.usefixtures("cpu_kernels")
def test_with_corrals_kernels_rows_of_a_batch_guess_together(tiny_bundle: TinyBundle) -> None:
    """Equal tokens with quantized weights, too: no sum depends on how many tokens or sequences a step has."""
    bundle = tiny_bundle("scout", "cpu", "int4", "corral")
    llm = LLM(bundle, prompt_lookup=True, prefix_cache_gb=0.1)
    steps: list[tuple[int, ...]] = []
    run = llm._engine._session.run

    def noting(step: Step) -> Float32:
        steps.append(step.positions_BS.shape)
        return run(step)

    llm._engine._session.run = noting  # type: ignore[method-assign]
    together = llm.generate(prompts(), PARAMS)
    assert any(batch > 1 and tokens > 1 for batch, tokens in steps)
    alone = [LLM(bundle).generate([prompt], PARAMS)[0].token_ids for prompt in prompts()]
    assert [answer.token_ids for answer in together] == alone
