"""Engine, scheduler and caches over the PyTorch reference: any order of work gives what whole sequences give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from corral.runtime.engine import Engine
from corral.runtime.request import Request
from corral.runtime.sampling_params import SamplingParams
from corral.spec.kv_layout import kv_layouts
from corral.spec.model_config import ModelConfig

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(config: ModelConfig, session: Any, embed: Any) -> MakeEngine:
    def make(**options: Any) -> Engine:
        options = {"max_context": 512, "vocab_size": config.vocab_size, **options}
        return Engine(session, embed, kv_layouts(config), **options)

    return make


def reference_logits(model: Any, ids: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.logits(torch.tensor([ids]))[0].numpy()


def reference_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(reference_logits(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def greedy(prompt: list[int], count: int, **options: Any) -> Request:
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, **options)
    return Request(tuple(prompt), params, max_tokens=count, eos_token_ids=(), decoder=None)


def finish(engine: Engine, *requests: Request) -> None:
    for request in requests:
        engine.add(request)
    while not all(request.done for request in requests):
        engine.step()


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, length).tolist() for length in lengths]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 37])
@pytest.mark.parametrize("step_tokens", [3, 512])
def test_scores_equal_whole_sequences_at_every_chunk_position(
    make_engine: MakeEngine, model: Any, length: int, step_tokens: int
) -> None:
    (ids,) = prompts(length)
    pieces = list(make_engine(step_tokens=step_tokens).score_pieces(ids))
    assert max(map(len, pieces)) <= step_tokens
    np.testing.assert_allclose(np.concatenate(pieces), reference_logits(model, ids), rtol=0, atol=2e-4)


def test_no_piece_crosses_a_chunk_boundary(make_engine: MakeEngine, session: Any) -> None:
    finish(make_engine(step_tokens=5), greedy(prompts(19)[0], 1))
    assert session.shapes == [(1, 5), (1, 3), (1, 5), (1, 3), (1, 3)]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 20])
def test_greedy_decoding_equals_whole_sequences_across_chunks(make_engine: MakeEngine, model: Any, length: int) -> None:
    (prompt,) = prompts(length)
    request = greedy(prompt, 20)
    finish(make_engine(), request)
    assert request.output_ids == reference_greedy(model, prompt, 20)


def test_a_batch_at_different_positions_equals_each_alone(make_engine: MakeEngine, session: Any, model: Any) -> None:
    requests = [
        greedy(prompt, count) for prompt, count in zip(prompts(3, 8, 15, 1, 22), (9, 20, 4, 17, 12), strict=True)
    ]
    finish(make_engine(), *requests)
    assert (5, 1) in session.shapes
    for request in requests:
        assert request.output_ids == reference_greedy(model, list(request.prompt_ids), request.max_tokens)


def test_more_prompts_than_slots_wait_in_line(make_engine: MakeEngine, session: Any, model: Any) -> None:
    requests = [greedy(prompt, count) for prompt, count in zip(prompts(3, 8, 15, 1, 22), (9, 3, 12, 1, 5), strict=True)]
    finish(make_engine(max_batch=2), *requests)
    assert max(batch for batch, _ in session.shapes) == 2
    for request in requests:
        assert request.output_ids == reference_greedy(model, list(request.prompt_ids), request.max_tokens)


def test_caches_grow_past_their_first_size_and_shrink_when_idle(make_engine: MakeEngine, model: Any) -> None:
    engine = make_engine(step_tokens=64)
    (prompt,) = prompts(254)
    request = greedy(prompt, 6)
    finish(engine, request)
    assert request.output_ids == reference_greedy(model, prompt, 6)
    assert engine._cache.bytes == 0


def test_a_long_prompts_cache_has_room_for_the_answer(make_engine: MakeEngine) -> None:
    """Growing would copy it: twice the memory."""
    [prompt] = prompts(300)
    engine, request = make_engine(), greedy(prompt, 20)
    engine.add(request)
    capacities = set()
    while not request.done:
        engine.step()
        if request.output_ids and not request.done:
            capacities.add(engine._cache.slot(0).keys[1].shape[2])  # of the layer that keeps every token
    assert capacities == {320}


def test_a_cancelled_request_leaves_the_others_alone(make_engine: MakeEngine, model: Any) -> None:
    engine = make_engine()
    requests = [greedy(prompt, 16) for prompt in prompts(5, 9, 12)]
    for request in requests:
        engine.add(request)
    for _ in range(10):
        engine.step()
    engine.cancel(requests[0])
    engine.cancel(requests[0])
    finish(engine, late := greedy(prompts(4)[0], 8))
    while not all(request.done for request in requests[1:]):
        engine.step()
    assert not requests[0].done
    for request in (*requests[1:], late):
        assert request.output_ids == reference_greedy(model, list(request.prompt_ids), request.max_tokens)


def test_a_half_read_prompt_moves_to_another_slot(make_engine: MakeEngine, model: Any) -> None:
    engine = make_engine(step_tokens=2)
    first, second = greedy(prompts(3)[0], 30), greedy(prompts(13)[0], 9)
    engine.add(first)
    for _ in range(4):
        engine.step()
    engine.add(second)
    while second.position <= 8:
        engine.step()
    assert second.position < 13 and not first.done
    engine.cancel(first)
    while not second.done:
        engine.step()
    assert second.output_ids == reference_greedy(model, list(second.prompt_ids), 9)


def test_scoring_while_others_generate_disturbs_nothing(make_engine: MakeEngine, model: Any) -> None:
    engine = make_engine()
    request, (ids,) = greedy(prompts(6)[0], 12), prompts(20)
    engine.add(request)
    for _ in range(5):
        engine.step()
    logits = np.concatenate(list(engine.score_pieces(ids)))
    while not request.done:
        engine.step()
    np.testing.assert_allclose(logits, reference_logits(model, ids), rtol=0, atol=2e-4)
    assert request.output_ids == reference_greedy(model, list(request.prompt_ids), 12)


def test_sampled_tokens_do_not_depend_on_the_neighbours(make_engine: MakeEngine) -> None:
    def sampled(prompt: list[int], seed: int) -> Request:
        params = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, seed=seed, ignore_eos=True)
        return Request(tuple(prompt), params, max_tokens=12, eos_token_ids=(), decoder=None)

    alone = []
    for seed, prompt in enumerate(prompts(4, 11, 7)):
        finish(make_engine(), request := sampled(prompt, seed))
        alone.append(request.output_ids)
    together = [sampled(prompt, seed) for seed, prompt in enumerate(prompts(4, 11, 7))]
    finish(make_engine(), *together)
    assert [request.output_ids for request in together] == alone


def test_what_breaks_a_step_reaches_its_requests_and_the_engine_goes_on(
    make_engine: MakeEngine, session: Any, model: Any
) -> None:
    engine, request = make_engine(), greedy(prompts(4)[0], 8)
    session.fail_at = 3
    finish(engine, request)
    with pytest.raises(RuntimeError, match="the session broke"):
        request.completion()
    session.fail_at = None
    finish(engine, again := greedy(prompts(4)[0], 8))
    assert again.output_ids == reference_greedy(model, prompts(4)[0], 8)


def test_not_a_number_fails_one_request_and_does_not_stay_in_the_cache(
    make_engine: MakeEngine, embed: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    poison = 255
    monkeypatch.setattr(engine, "_embed", lambda ids: np.where(np.array(ids)[:, None] == poison, np.nan, embed(ids)))
    good, bad = greedy([1, 2, 3], 10), greedy([poison] * 12, 10)
    finish(engine, bad, good)
    later = greedy([4, 5], 10)
    finish(engine, later)
    assert "not finite" in str(bad.error)
    assert good.output_ids == reference_greedy(model, [1, 2, 3], 10)
    assert later.output_ids == reference_greedy(model, [4, 5], 10)
