"""Versions, from metadata."""

from __future__ import annotations

import pytest

from corral.runtime import requirements
from corral.spec.errors import EnvironmentProblem


@pytest.mark.parametrize(
    ("older", "newer"), [("1.9", "1.31"), ("1.30.2", "1.31.0rc1"), ("1", "1.0.1"), ("1.31", "1.31.1+cu12")]
)
def test_versions_compare_by_number(older: str, newer: str) -> None:
    assert requirements.release(older) < requirements.release(newer)
    assert requirements.release("1.0") == requirements.release("1")


def test_two_builds_of_onnxruntime_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        requirements, "_version", lambda name: "2.0" if name in ("onnxruntime", "onnxruntime-gpu") else None
    )
    with pytest.raises(EnvironmentProblem, match="onnxruntime and onnxruntime-gpu are both installed"):
        requirements.check_requirements({"onnxruntime": "1.31"})


def test_the_gpu_build_counts_as_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "_version", lambda name: "1.31.1" if name == "onnxruntime-gpu" else None)
    requirements.check_requirements({"onnxruntime": "1.31"})
