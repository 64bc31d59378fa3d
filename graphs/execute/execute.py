"""Execute a plan: every job, one after the other, into shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from corral.graphs.execute.job import plan_jobs, run_job
from corral.graphs.execute.shards import ShardWriter
from corral.spec.progress import Progress, silent
from corral.spec.weight_plan import Source, WeightPlan


def execute(
    plan: WeightPlan,
    directory: Path,
    read: Callable[[Source], NDArray[np.float32]],
    *,
    progress: Progress = silent,
) -> list[str]:
    """Write the plan's shards into `directory`; returns their names. Peak memory is that of one job.

    Raises what `read` raises (InputError for damaged weights) and OSError where the disk refuses.
    """
    placements = plan.placements()
    jobs = plan_jobs(plan, placements)
    total = sum(job.elements for job in jobs)
    done = 0
    with ShardWriter(directory, placements) as shards:
        for job in jobs:
            for output, data in run_job(job, read):
                shards.write(output.shard, output.offset, data)
            done += job.elements
            progress("weights", done, total, "parameters")
        return shards.finish()
