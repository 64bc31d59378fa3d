"""Versions and cores, from metadata and /sys."""

from __future__ import annotations

from pathlib import Path

import pytest

from corral.runtime import requirements
from corral.runtime.cores import usable_cores
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


def fake_cpus(system: Path, siblings: list[str]) -> None:
    for cpu, value in enumerate(siblings):
        path = system / f"devices/system/cpu/cpu{cpu}/topology"
        path.mkdir(parents=True)
        (path / "thread_siblings_list").write_text(value + "\n")


def test_hyperthreads_count_once_and_a_quota_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3, 4, 5}, raising=False)
    fake_cpus(tmp_path, ["0,3", "1,4", "2,5", "0,3", "1,4", "2,5"])
    assert usable_cores(tmp_path) == 3
    (tmp_path / "fs/cgroup").mkdir(parents=True)
    (tmp_path / "fs/cgroup/cpu.max").write_text("250000 100000\n")
    assert usable_cores(tmp_path) == 2
    (tmp_path / "fs/cgroup/cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == 3
