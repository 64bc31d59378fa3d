"""Cores and memory, from /sys and /proc."""

from __future__ import annotations

from pathlib import Path

import pytest

from corral.spec.machine import usable_cores, usable_memory


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


def test_a_container_limits_memory(tmp_path: Path) -> None:
    assert usable_memory(tmp_path) == 4 << 30
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert usable_memory(tmp_path) == 8000 << 10
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("5000000\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("2000000\n")
    assert usable_memory(tmp_path) == 3_000_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert usable_memory(tmp_path) == 8000 << 10
