"""A build that is nothing but numbers: logits from a table, times from a list."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corral.spec.model_config import ModelConfig, parse_config
from corral.validate.build import Logits, Run


class FakeBuild:
    """`logits` of a token are row `token` of `table`; blocks have `rows` rows; every call is noted in `calls`."""

    kind = "bundle"
    bytes = 1000

    def __init__(
        self, name: str, table: Logits, config: ModelConfig, *, rows: int = 3, calls: list[str] | None = None
    ) -> None:
        self.name, self.table, self.config, self.rows = name, table, config, rows
        self.calls: list[str] = [] if calls is None else calls
        self.ids: list[int] | None = None
        self.speeds: Iterator[float] = iter(())

    def encode(self, text: str) -> list[int] | None:
        return self.ids

    def logits(self, token_ids: Sequence[int]) -> Iterator[Logits]:
        every = self.table[list(token_ids)]
        for start in range(0, len(every), self.rows):
            yield every[start : start + self.rows].copy()

    def time_decode(self, token_ids: Sequence[int], count: int) -> Run | None:
        self.calls.append(self.name)
        return Run(time_to_first_token=0.01, tokens_per_second=next(self.speeds)) if self.kind == "bundle" else None

    def continue_greedily(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        texts = [list(prompt) for prompt in prompts]
        for text in texts:
            for _ in range(count):
                text.append(int(self.table[text[-1]].argmax()))
        return [text[-count:] for text in texts]


FakeBuilds = Callable[..., FakeBuild]


@pytest.fixture
def fake_build(tiny_config: Callable[[str], dict[str, Any]]) -> FakeBuilds:
    """`fake_build("name", table)` -> a FakeBuild whose vocabulary is the table's width."""

    def make(name: str, table: Any, **options: Any) -> FakeBuild:
        logits = np.asarray(table, dtype=np.float32)
        config = parse_config({**tiny_config("scout"), "vocab_size": logits.shape[1], "bos_token_id": 0})
        return FakeBuild(name, logits, config, **options)

    return make


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
