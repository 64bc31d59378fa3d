"""A compile that writes nothing: every weight is read and computed, and only its digest is kept.

A dress rehearsal where the disk is too small for the bundle, or before machines for the real thing are paid for.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from corral.graphs.calibrate.calibrate import calibrate
from corral.graphs.compiler import lower
from corral.graphs.execute.execute import run_jobs
from corral.graphs.execute.execution import Execution
from corral.graphs.execute.executors import RunJob
from corral.graphs.execute.job import Job, ReadPiece, ReadStatistics, plan_jobs
from corral.graphs.execute.shards import shard_name
from corral.graphs.quantize.methods import needs_text
from corral.graphs.split_stages import place_weights, split_stages
from corral.model.checkpoint.open import open_checkpoint
from corral.spec.errors import InputError
from corral.spec.progress import Progress, silent
from corral.spec.recipe import Recipe
from corral.spec.weight_plan import Placement, WeightPlan


@dataclass(frozen=True, kw_only=True)
class ShardDigest:
    """What a compile would have written into one shard: file name, bytes, and the digest that `shard_digests` defines."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What came out: the shards, how many of the model's parameters were read, and the seconds that computing took."""

    shards: tuple[ShardDigest, ...]
    parameters: int
    seconds: float

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


def rehearse(
    checkpoint: str | Path,
    recipe: Recipe,
    *,
    jobs: int | None = None,
    ray: str | None = None,
    progress: Progress = silent,
) -> Rehearsal:
    """Do all that `compile` does except writing, and return digests. Needs its time and memory, and no disk space but
    for a calibration's statistics, which lie in the temporary directory meanwhile.

    Raises InputError for a bad checkpoint or recipe, damaged weights included; EnvironmentProblem where a worker is lost.
    """
    if ray is not None and needs_text(recipe):
        raise InputError(
            "a rehearsal keeps what is learned of the calibration text in this machine's temporary directory, which "
            "a Ray cluster does not see. Rehearse without --ray, or compile with -o on the file system that all share."
        )
    how = Execution(jobs=jobs, ray=ray)
    source = open_checkpoint(Path(checkpoint), progress=progress)
    work = lower(source, recipe, progress=progress)
    placements = place_weights(work, split_stages(work))
    with tempfile.TemporaryDirectory(prefix="corral-") as scratch:
        calibration = calibrate(work, source, Path(scratch), progress)
        known = calibration.statistics.of if calibration else None
        return rehearse_plan(work.plan, placements, source.read_piece, how, progress, known)


def rehearse_plan(
    plan: WeightPlan,
    placements: Mapping[str, Placement],
    read: ReadPiece,
    how: Execution,
    progress: Progress = silent,
    read_statistics: ReadStatistics | None = None,
) -> Rehearsal:
    """Compute a plan's weights and keep their digests."""
    started = time.monotonic()
    jobs = plan_jobs(plan, placements, how.job_elements)
    digests = dict(run_jobs(jobs, RunJob(read, None, read_statistics), how, progress))
    return Rehearsal(
        shards=shard_digests(jobs, digests),
        parameters=sum(job.elements for job in jobs),
        seconds=time.monotonic() - started,
    )


def shard_digests(jobs: Sequence[Job], digests: Mapping[int, Sequence[str]]) -> tuple[ShardDigest, ...]:
    """Each shard's digest, of the SHA-256s of all jobs' outputs, as a rehearsal and the journal of a compile have them.

    It is the SHA-256 of one line "OFFSET BYTES SHA256" for each output in the shard, by offset. The file's own SHA-256
    would need all its bytes in one place and in order, which is what executing by pieces avoids.
    """
    written = sorted(
        (output.shard, output.offset, output.nbytes, digest)
        for i, job in enumerate(jobs)
        for output, digest in zip(job.outputs, digests[i], strict=True)
    )
    lines: dict[int, list[str]] = {}
    ends: dict[int, int] = {}
    for shard, offset, nbytes, digest in written:
        lines.setdefault(shard, []).append(f"{offset} {nbytes} {digest}\n")
        ends[shard] = offset + nbytes
    return tuple(
        ShardDigest(name=shard_name(i), bytes=ends[i], sha256=hashlib.sha256("".join(lines[i]).encode()).hexdigest())
        for i in lines
    )
