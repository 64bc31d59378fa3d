"""The journal of a compile: which jobs are finished and durable, so that a compile killed at any moment goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from corral.graphs.execute.job import Job
from corral.graphs.execute.shards import PARTIAL
from corral.spec.errors import InputError
from corral.spec.unfinished import JOURNAL_FORMAT, JOURNAL_NAME, read_journal


def compile_key(jobs: Sequence[Job], *identity: str) -> str:
    """Name a compile by content: its jobs, in order, and whatever else decides the bytes (the checkpoint's identity)."""
    digest = hashlib.sha256("\n".join(identity).encode())
    for job in jobs:
        digest.update(repr(job).encode())
    return digest.hexdigest()


class Journal:
    """An open journal. `done` holds what earlier runs of the same compile finished, and then this one."""

    def __init__(self, path: Path, jobs: int, done: Mapping[int, tuple[str, ...]]) -> None:
        self.path = path
        self.jobs = jobs
        self.done = dict(done)

    def __str__(self) -> str:
        return f"{len(self.done):,} of {self.jobs:,} jobs"

    def append(self, finished: Mapping[int, tuple[str, ...]]) -> None:
        """Note jobs whose bytes are durable."""
        lines = [json.dumps({"job": job, "sha256": digests}) + "\n" for job, digests in finished.items()]
        with self.path.open("ab") as file:
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
        self.done.update(finished)

    def forget(self, jobs: Sequence[int]) -> None:
        """What these jobs wrote is gone; they do not count any more. (The journal says so when they are run again.)"""
        for job in jobs:
            self.done.pop(job, None)


def open_journal(directory: Path, key: str, what: str, jobs: int) -> Journal:
    """Begin a journal, or go on with the one that is there. Raises InputError where that is of another compile.

    `what` says in words what is compiled: "demo-scout, int4 for target cpu".
    """
    path = directory / JOURNAL_NAME
    if not path.exists():
        head = {"journal": JOURNAL_FORMAT, "key": key, "what": what, "jobs": jobs}
        partial = path.with_name(path.name + PARTIAL)
        with partial.open("wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        return Journal(path, jobs, {})
    found = read_journal(directory)
    if found is None:
        raise InputError(f"{path} cannot be read: it is damaged, or of another corral. Add --fresh to start over.")
    if found.key != key:
        other = f"of {found.what}" if found.what != what else "of this checkpoint and recipe before one of them changed"
        raise InputError(
            f"{directory} is an unfinished compile {other} ({found}); expected {what}, as it is now. "
            "Choose another -o, or add --fresh to start over."
        )
    os.truncate(path, found.end)  # a torn last line
    return Journal(path, jobs, found.done)
