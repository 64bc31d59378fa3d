from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

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
