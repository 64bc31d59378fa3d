"""How a plan is executed, whatever the plan: how many processes, how large the jobs, how often progress is made durable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from corral.graphs.execute.executors import Executor, Serial
from corral.graphs.execute.job import Job
from corral.graphs.execute.process_pool import ProcessPool
from corral.graphs.execute.ray_cluster import RayCluster, check_ray
from corral.spec.errors import InputError
from corral.spec.machine import usable_cores, usable_memory
from corral.spec.weight_plan import JOB_ELEMENTS, PROCESS_BYTES

# A worker needs seconds to start; with less than this to do it is not worth it.
ELEMENTS_WORTH_A_WORKER = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Execution:
    """`jobs`: processes at once; None: as many as there are CPUs, memory and work for. Same bytes whatever is chosen."""

    jobs: int | None = None
    ray: str | None = None  # HOST:PORT of a Ray cluster that runs them
    executor: Executor | None = None  # in place of the one that `jobs` and `ray` mean
    job_elements: int = JOB_ELEMENTS
    # Finished jobs are made durable, and then journalled, after this many bytes or seconds.
    sync_bytes: int = 256 << 20
    sync_seconds: float = 5.0

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise InputError(
                f"--jobs is {self.jobs}; expected at least 1: the number of processes that compute weights."
            )
        if self.ray is not None:  # seconds before anybody would notice
            check_ray(self.ray)

    def workers(self, jobs: Sequence[Job]) -> int:
        """Processes for these jobs."""
        if self.jobs is not None:
            return max(1, min(self.jobs, len(jobs)))
        total = sum(job.elements for job in jobs)
        by_memory = usable_memory() // (PROCESS_BYTES + max((job.peak_bytes for job in jobs), default=0))
        return max(1, min(usable_cores(), by_memory, total // ELEMENTS_WORTH_A_WORKER, len(jobs)))

    def executor_for(self, jobs: Sequence[Job]) -> Executor:
        """Who runs these jobs."""
        if self.executor is not None:
            return self.executor
        if self.ray is not None:
            return RayCluster(self.ray, self.jobs)
        workers = self.workers(jobs)
        return Serial() if workers == 1 else ProcessPool(workers)
