"""How many threads pay off: physical cores this process may use, within a container's quota."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores(system: Path = Path("/sys")) -> int:
    """Physical cores of the affinity mask, at most the cgroup's CPU quota; at least 1."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = {_siblings(system, cpu) for cpu in allowed}
    return max(1, min(len(siblings), _quota(system) or len(siblings)))


def _siblings(system: Path, cpu: int) -> str:
    try:
        return (system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota(system: Path) -> int | None:
    try:
        quota, period = (system / "fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError, ZeroDivisionError):  # none, or "max"
        return None
