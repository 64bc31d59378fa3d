"""Run a command and print, as JSON, its seconds and the peak memory of all its processes together.

`cpu_seconds` are those that its processes computed: they say more than `seconds` where others share the machine.

    python benchmarks/peak_memory.py corral compile synthetic:scout -o /tmp/scout --target cpu --weights int4

`resident` sums the resident memory of every process (shared pages count in each: an upper bound), `anonymous` only what
belongs to no file. Sampled every quarter of a second, from /proc.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

EVERY = 0.25  # seconds
FIELDS = {"resident": "VmRSS", "anonymous": "RssAnon"}


def family(root: int) -> Iterator[int]:
    """`root` and everything it started, by process id."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue  # gone meanwhile
        children.setdefault(parent, []).append(int(stat.parent.name))
    waiting = [root]
    while waiting:
        yield (pid := waiting.pop())
        waiting += children.get(pid, [])


def memory(pid: int, fields: Mapping[str, str] = FIELDS) -> dict[str, int]:
    """Bytes of one process, by the names of `fields` in its status; zero where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        lines = []
    found = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.strip()}
    return {field: int(found.get(name, "0")) << 10 for field, name in fields.items()}


def main(command: list[str]) -> int:
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    started, peak, processes = time.monotonic(), dict.fromkeys(FIELDS, 0), 0
    running = subprocess.Popen(command, stdout=sys.stderr)  # stdout is for the figures
    while running.poll() is None:
        found = [memory(pid) for pid in family(running.pid)]
        processes = max(processes, len(found))
        for field in FIELDS:
            peak[field] = max(peak[field], sum(one[field] for one in found))
        time.sleep(EVERY)
    figures = {f"peak_{field}_gib": round(size / 2**30, 2) for field, size in peak.items()}
    seconds, used = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    times = {"seconds": round(seconds, 1), "cpu_seconds": round(used.ru_utime + used.ru_stime, 1)}
    print(json.dumps({**times, "processes": processes, **figures}))
    return running.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
