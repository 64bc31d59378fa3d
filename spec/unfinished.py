"""The journal of an unfinished compile, read by whoever meets its directory: what it is of, and how far it came.

One JSON object a line: first what is compiled, then each finished job with the SHA-256 of what it wrote. Lines are only
ever appended, so a compile killed at any moment leaves at most one torn line, the last, which does not count.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOURNAL_NAME = "compile.journal"
JOURNAL_FORMAT = 1


@dataclass(frozen=True)
class Unfinished:
    """A journal's content. `key` names plan and checkpoint; `what` says them in words; `end` is where good lines end."""

    key: str
    what: str
    jobs: int
    done: Mapping[int, tuple[str, ...]]  # job -> SHA-256 of each of its outputs
    end: int

    def __str__(self) -> str:
        return f"{len(self.done):,} of {self.jobs:,} jobs"


def read_journal(directory: Path) -> Unfinished | None:
    """The journal in `directory`; None where there is none, or no readable one."""
    try:
        lines = (directory / JOURNAL_NAME).read_bytes().splitlines(keepends=True)
    except OSError:
        return None
    head = _line(lines[0]) if lines else None
    if head is None or head.get("journal") != JOURNAL_FORMAT:
        return None
    done: dict[int, tuple[str, ...]] = {}
    end = len(lines[0])
    for line in lines[1:]:
        item = _line(line)
        if item is None or not isinstance(item.get("job"), int) or not isinstance(item.get("sha256"), list):
            break
        done[item["job"]] = tuple(item["sha256"])
        end += len(line)
    try:
        return Unfinished(str(head["key"]), str(head["what"]), int(head["jobs"]), done, end)
    except (KeyError, TypeError, ValueError):
        return None


def _line(line: bytes) -> dict[str, Any] | None:
    try:
        item = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return item if isinstance(item, dict) else None
