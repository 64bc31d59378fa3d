"""Execute a plan's jobs, into shards and a journal of what is durable there, or for their digests alone."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Sequence
from contextlib import closing, suppress

from corral.graphs.execute.execution import Execution
from corral.graphs.execute.executors import Finished, RunJob
from corral.graphs.execute.job import Job, ReadPiece, ReadStatistics
from corral.graphs.execute.journal import Journal
from corral.graphs.execute.shards import Shards
from corral.spec.progress import Progress, silent


def execute(
    jobs: Sequence[Job],
    shards: Shards,
    read: ReadPiece,
    journal: Journal,
    how: Execution,
    progress: Progress = silent,
    read_statistics: ReadStatistics | None = None,
) -> list[str]:
    """Write the shards of the jobs' plan; returns their names. Peak memory is that of one job in each process.

    Jobs that the journal knows are not run again. Raises what `read` raises (InputError for damaged weights) and OSError
    where the disk refuses; what was finished until then is in the journal.
    """
    kept = shards.prepare()
    journal.forget([i for i, job in enumerate(jobs) if not kept.issuperset(o.shard for o in job.outputs)])
    batch = _Batch(jobs, shards, journal, how)
    try:
        with closing(
            run_jobs(jobs, RunJob(read, shards, read_statistics), how, progress, done=journal.done)
        ) as finished:
            for index, digests in finished:
                batch.add(index, digests)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            batch.commit()
        raise
    batch.commit()
    return shards.finish()


def run_jobs(
    jobs: Sequence[Job], run_job: RunJob, how: Execution, progress: Progress = silent, *, done: Collection[int] = ()
) -> Generator[Finished, None, None]:
    """Run the jobs that are not `done` and yield each as it is finished, in any order; progress counts parameters."""
    left = [(i, job) for i, job in enumerate(jobs) if i not in done]
    executor = how.executor_for([job for _, job in left])
    total = sum(job.elements for job in jobs)
    finished = total - sum(job.elements for _, job in left)
    what = f"weights ({executor})"
    progress(what, finished, total, "parameters")
    with closing(executor.run(run_job, left)) as running:
        for index, digests in running:
            finished += jobs[index].elements
            yield index, digests
            progress(what, finished, total, "parameters")


class _Batch:
    """Finished jobs whose bytes may still be in the operating system's memory only."""

    def __init__(self, jobs: Sequence[Job], shards: Shards, journal: Journal, how: Execution) -> None:
        self.jobs, self.shards, self.journal, self.how = jobs, shards, journal, how
        self.finished: dict[int, tuple[str, ...]] = {}
        self.bytes = 0
        self.since = time.monotonic()

    def add(self, index: int, digests: tuple[str, ...]) -> None:
        self.finished[index] = digests
        self.bytes += sum(output.nbytes for output in self.jobs[index].outputs)
        if self.bytes >= self.how.sync_bytes or time.monotonic() - self.since >= self.how.sync_seconds:
            self.commit()

    def commit(self) -> None:
        """Make the bytes durable, and then say so in the journal."""
        if self.finished:
            self.shards.sync({output.shard for index in self.finished for output in self.jobs[index].outputs})
            self.journal.append(self.finished)
        self.finished, self.bytes, self.since = {}, 0, time.monotonic()
