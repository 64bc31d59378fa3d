from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from corral.validate.build import Run
from corral.validate.latency import measure_latency

FakeBuilds = Callable[..., Any]
TABLE = np.zeros((4, 4))


def test_builds_take_turns_and_the_first_round_is_warm_up(fake_build: FakeBuilds) -> None:
    calls: list[str] = []
    a, b = (fake_build(name, TABLE, calls=calls) for name in "ab")
    a.speeds, b.speeds = iter([1.0, 10, 30, 20]), iter([1.0, 100, 100, 400])
    found = measure_latency([a, b], [1, 2], repeats=3)
    assert "".join(calls) == "abbaabba"
    speeds = [latency.tokens_per_second for latency in found if latency]
    assert [(s.median, s.min, s.max, s.n) for s in speeds] == [(20.0, 10.0, 30.0, 3), (100.0, 100.0, 400.0, 3)]


def test_a_checkpoint_has_no_speed(fake_build: FakeBuilds) -> None:
    reference, bundle = fake_build("reference", TABLE), fake_build("bundle", TABLE)
    reference.kind = "checkpoint"
    bundle.speeds = iter([1.0, 2.0])
    none, latency = measure_latency([reference, bundle], [1], repeats=1)
    assert none is None
    assert latency is not None and latency.tokens_per_second.median == 2.0


def test_every_token_of_every_run_is_a_sample(fake_build: FakeBuilds, monkeypatch: Any) -> None:
    build = fake_build("bundle", TABLE)
    runs = iter(
        [Run(time_to_first_token=1.0, tokens_per_second=1.0, between_tokens=(float(i),) * 40) for i in range(4)]
    )
    monkeypatch.setattr(build, "time_decode", lambda prompt, tokens: next(runs))
    [latency] = measure_latency([build], [1], repeats=3)
    assert latency is not None
    assert latency.between_tokens.n == 120  # and the first round is warm-up
    assert latency.between_tokens.p50 is not None and latency.between_tokens.p50.value == 2.0
    assert latency.between_tokens.p95 is not None and latency.between_tokens.p99 is None
    assert latency.first_tokens.p50 is None  # three are too few
