"""What this process may use of its machine: cores and memory, within a container's limits."""

from __future__ import annotations

import os
import re
from pathlib import Path


def usable_cores(system: Path = Path("/sys")) -> int:
    """Physical cores of the affinity mask, at most the cgroup's CPU quota; at least 1."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = {_siblings(system, cpu) for cpu in allowed}
    return max(1, min(len(siblings), _quota(system) or len(siblings)))


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that are free or can be freed, within a container's limit; 4 GiB where nobody knows."""
    free = re.search(r"^MemAvailable:\s*(\d+) kB", _read(root / "proc/meminfo"), re.M)
    limit, used = (_read(root / f"sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    amounts = [int(free[1]) << 10] if free else []
    if limit.isdigit() and used.isdigit():
        amounts.append(max(0, int(limit) - int(used)))
    return min(amounts, default=4 << 30)


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


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
