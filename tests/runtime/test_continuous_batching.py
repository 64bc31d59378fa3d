"""Requests that come and go at any step, with prompts around chunk boundaries: each as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corral.runtime import LLM, SamplingParams
from corral.runtime.engine import Engine
from corral.runtime.request import Request
from corral.spec.errors import Overloaded
from corral.spec.kv_layout import kv_layouts
from corral.spec.model_config import ModelConfig

MakeEngine = Callable[..., Engine]


@dataclass(frozen=True)
class Visit:
    """A request: the step it comes at, what it wants, and the step it is given up at."""

    arrives: int
    length: int  # of the prompt
    count: int  # tokens to write
    seed: int
    leaves: int | None

    def request(self) -> Request:
        params = SamplingParams(max_tokens=self.count, temperature=0.8, top_p=0.9, seed=self.seed, ignore_eos=True)
        prompt = np.random.default_rng(self.seed).integers(0, 256, self.length).tolist()
        return Request(tuple(prompt), params, max_tokens=self.count, eos_token_ids=(), decoder=None)


VISITS = st.builds(
    Visit,
    arrives=st.integers(0, 30),
    length=st.sampled_from([1, 3, 7, 8, 9, 15, 16, 17, 26]),
    count=st.integers(1, 12),
    seed=st.integers(0, 9),
    leaves=st.none() | st.integers(0, 60),
)


@pytest.fixture
def make_engine(config: ModelConfig, session: Any, embed: Any) -> MakeEngine:
    return lambda **options: Engine(
        session, embed, kv_layouts(config), max_context=512, vocab_size=config.vocab_size, **options
    )


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    visits=st.lists(VISITS, min_size=1, max_size=6),
    max_batch=st.integers(1, 4),
    step_tokens=st.sampled_from([1, 4, 6, 64]),
)
def test_every_request_gets_what_it_gets_alone(
    make_engine: MakeEngine, visits: list[Visit], max_batch: int, step_tokens: int
) -> None:
    engine = make_engine(max_batch=max_batch, step_tokens=step_tokens)
    requests = [visit.request() for visit in visits]
    last = max(max(visit.arrives, visit.leaves or 0) for visit in visits)
    step = 0
    while step <= last or not engine.idle:
        for visit, request in zip(visits, requests, strict=True):
            if visit.arrives == step:
                engine.add(request)
            if visit.leaves == step:
                engine.cancel(request)
        engine.step()
        step += 1
    for visit, request in zip(visits, requests, strict=True):
        alone = visit.request()
        engine.add(alone)
        while not alone.done:
            engine.step()
        if visit.leaves is None or visit.leaves < visit.arrives:
            assert request.done
        assert request.output_ids == alone.output_ids[: len(request.output_ids)]
        assert not request.done or len(request.output_ids) == visit.count


def test_a_line_that_is_full_says_so(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch=1, max_waiting=2)
    visit = Visit(arrives=0, length=3, count=2, seed=0, leaves=None)
    requests = [visit.request() for _ in range(4)]
    for request in requests[:2]:
        engine.add(request)
    with pytest.raises(Overloaded, match="2 requests are waiting already"):
        engine.add(requests[2])
    engine.step()  # the first one runs, so there is a place in line
    engine.add(requests[3])
    while not requests[3].done:
        engine.step()
    assert engine.idle


def test_a_batch_may_be_larger_than_the_line(make_bundle: Any, model: Any, session: Any) -> None:
    llm = LLM(
        make_bundle(table=model.embed_tokens.weight.detach().numpy()), session=session, max_batch=2, max_waiting=1
    )
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    prompts = [[n, n + 1] for n in range(7)]
    assert [c.token_ids for c in llm.generate(prompts, params)] == [
        llm.generate([prompt], params)[0].token_ids for prompt in prompts
    ]
