"""Where an engine's text ends and its weights begin. What the text says is seen on real engines, in test_engines.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from corral.graphs.engine.schedule import GAP, SCHEDULE, read_schedules, weight_bytes

BODY = (
    "\n  region = {{ name=input size=64 type=user place=accelerator }}\n  region = {{ name={} size=64 type=user "
    "place=accelerator }}\ndescriptors {{\n" + "x" * 100_000 + "\n}}\n"
)


def schedule(name: str) -> bytes:
    return SCHEDULE + b"1" + BODY.format(name).encode()


@pytest.mark.parametrize("gap", [0, GAP])
def test_weights_are_what_lies_behind_the_texts_of_all_schedules(tmp_path: Path, gap: int) -> None:
    """Schedules lie behind each other with little between them, and weights, which may look like text, behind all."""
    weights = np.random.default_rng(0).bytes(1 << 20) + b"y" * 1000
    text = schedule("a") + bytes(gap) + schedule("b")
    (tmp_path / "engine").write_bytes(b"\0" * 100 + text + bytes(GAP + 1) + weights)
    assert weight_bytes(tmp_path / "engine") == 100 + GAP + 1 + len(weights)
    assert [found.scratch_bytes for found in read_schedules(tmp_path / "engine")] == [128, 128]


def test_weights_may_lie_between_schedules(tmp_path: Path) -> None:
    weights = b"\xff" * (1 << 20)
    (tmp_path / "engine").write_bytes(schedule("a") + weights + schedule("b") + weights)
    assert weight_bytes(tmp_path / "engine") == 2 * len(weights)
    assert len(read_schedules(tmp_path / "engine")) == 2


def test_an_engine_without_text_has_no_schedules(tmp_path: Path) -> None:
    (tmp_path / "engine").write_bytes(b"\0" * 1000)
    assert read_schedules(tmp_path / "engine") == []
    assert weight_bytes(tmp_path / "engine") == 1000
