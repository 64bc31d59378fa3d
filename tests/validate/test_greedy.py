from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corral.validate.build import open_build
from corral.validate.greedy import measure_greedy

FakeBuilds = Callable[..., Any]
NEXT = np.eye(5)[[1, 2, 3, 4, 0]]  # each token is followed by the next number


def test_the_first_token_that_differs_is_found(fake_build: FakeBuilds) -> None:
    other = NEXT.copy()
    other[4] = np.eye(5)[2]  # after 4 comes 2 and not 0
    windows = [[0] * 31 + [last] for last in (0, 3, 4)]
    candidates = [fake_build("same", NEXT), fake_build("other", other)]
    same, different = measure_greedy(fake_build("reference", NEXT), candidates, windows, prompt_tokens=32, tokens=7)
    assert (same.alike, same.median) == ((7, 7, 7), 7)
    assert (different.alike, different.median) == ((4, 1, 0), 1)


def test_short_windows_give_one_prompt(fake_build: FakeBuilds) -> None:
    build = fake_build("build", NEXT)
    [found] = measure_greedy(build, [build], [[0, 1], [0, 1, 2]], tokens=3)
    assert found.alike == (3,)


@pytest.mark.parametrize("form", ["scout", "maverick"])
def test_bundle_and_pytorch_write_the_same(
    tiny_checkpoint: Callable[[str], Path], tiny_bundle: Callable[[str, str, str], Path], form: str
) -> None:
    """By two runtimes, one of which has a cache, across the boundary of an attention chunk of 16."""
    how: dict[str, Any] = {"provider": "cpu", "threads": 1}
    builds = [open_build(path, **how) for path in (tiny_checkpoint(form), tiny_bundle(form, "cpu", "fp32"))]
    prompts = np.random.default_rng(2).integers(0, 256, (3, 10)).tolist()
    ours, theirs = (build.continue_greedily(prompts, 20) for build in builds)
    assert ours == theirs
    assert [len(text) for text in ours] == [20] * 3
    windows = [prompt * 4 for prompt in prompts]
    [found] = measure_greedy(builds[0], builds[1:], windows, prompt_tokens=32, tokens=20)
    assert found.alike == (20, 20, 20)
