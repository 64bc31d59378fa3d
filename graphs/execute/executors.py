"""Who runs a plan's jobs: one interface, whose simplest form runs them here, one after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Protocol

from corral.graphs.execute.job import Job, ReadPiece, ReadStatistics, run_job
from corral.graphs.execute.shards import Shards

# Where a job stands in the plan, and the SHA-256 of each of its outputs: all that comes back from a job.
Finished = tuple[int, tuple[str, ...]]

AHEAD = 2  # jobs that a worker is given at most: one it runs and the next, so that it never waits


@dataclass(frozen=True)
class RunJob:
    """Run a job and put its bytes into the shards (None: keep only their digests). Pickles into worker processes."""

    read: ReadPiece
    shards: Shards | None
    read_statistics: ReadStatistics | None = None

    def __call__(self, job: Job) -> tuple[str, ...]:
        digests = []
        for output, data in run_job(job, self.read, self.read_statistics):
            if self.shards is not None:
                self.shards.write(output.shard, output.offset, data)
            digests.append(hashlib.sha256(data).hexdigest())
        return tuple(digests)


class Executor(Protocol):
    """Runs numbered jobs in any order and yields each as it is finished.

    The first error ends everything and is raised as itself. Closing the iterator ends everything, too. As a string it says
    who runs them: "2 processes".
    """

    def run(self, run_job: RunJob, jobs: Iterable[tuple[int, Job]]) -> Generator[Finished, None, None]: ...


@dataclass(frozen=True)
class Serial:
    """One job after the other, in this process."""

    def __str__(self) -> str:
        return "1 process"

    def run(self, run_job: RunJob, jobs: Iterable[tuple[int, Job]]) -> Generator[Finished, None, None]:
        for index, job in jobs:
            yield index, run_job(job)
