"""What the C library keeps of freed memory goes back to the system, after large caches and not after small ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corral.runtime import engine as engine_module
from corral.runtime.engine import Engine
from corral.runtime.give_back import give_memory_back
from corral.runtime.request import Request
from corral.runtime.sampling_params import SamplingParams
from corral.spec.kv_layout import kv_layouts
from corral.spec.model_config import ModelConfig


def resident_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) << 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back() -> None:
    pieces = [np.ones(4096, np.uint8) for _ in range(20_000)]  # so small that glibc keeps them
    held = resident_bytes()
    del pieces[:-1]  # the last one lies behind all of them
    give_memory_back()
    assert resident_bytes() < held - 60_000_000


@pytest.mark.parametrize(("worth", "times"), [(1, 1), (1 << 40, 0)])
def test_it_is_done_when_large_caches_are_dropped(
    config: ModelConfig,
    session: Any,
    embed: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    worth: int,
    times: int,
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(engine_module, "WORTH_BYTES", worth)
    monkeypatch.setattr(engine_module, "give_memory_back", lambda: calls.append(1))
    engine = Engine(session, embed, kv_layouts(config), max_context=64, vocab_size=config.vocab_size)
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    request = Request((1, 2, 3), params, max_tokens=2, eos_token_ids=(), decoder=None)
    engine.add(request)
    while not request.done:
        engine.step()
    assert len(calls) == times
