"""Executors and resume: same bytes whoever computes them and wherever it was killed; errors are raised as themselves."""

from __future__ import annotations

import errno
import fcntl
import functools
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from corral.graphs.compiler import lower
from corral.graphs.execute.execution import Execution
from corral.graphs.execute.executors import Finished, RunJob, Serial
from corral.graphs.execute.job import Job, plan_jobs
from corral.graphs.execute.process_pool import ProcessPool
from corral.graphs.execute.shards import Shards
from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.write_bundle import write_bundle
from corral.model.checkpoint.open import open_checkpoint
from corral.spec.bundle import open_bundle
from corral.spec.errors import EnvironmentProblem, InputError
from corral.spec.recipe import Recipe
from corral.spec.unfinished import JOURNAL_NAME, read_journal

Checkpoint = Callable[[str], Path]
INT4 = Recipe(target="cpu", weights="int4", group_size=32)
INT8 = Recipe(target="cpu", weights="int8", group_size=32)
ELEMENTS = 1500  # a job's: some 400 jobs for the tiny model
KILLS = 20


@dataclass(frozen=True)
class StopAfter:
    """Run some jobs, then raise."""

    jobs: int
    error: BaseException

    def run(self, run_job: RunJob, jobs: Iterable[tuple[int, Job]]) -> Generator[Finished, None, None]:
        for count, finished in enumerate(Serial().run(run_job, jobs)):
            if count == self.jobs:
                raise self.error
            yield finished


@dataclass(frozen=True)
class Slow:
    """Sleep before each job."""

    seconds: float

    def run(self, run_job: RunJob, jobs: Iterable[tuple[int, Job]]) -> Generator[Finished, None, None]:
        for index, job in jobs:
            time.sleep(self.seconds)
            yield index, run_job(job)


@functools.cache
def lowered(checkpoint: Path, recipe: Recipe) -> ModelAndPlan:
    return lower(open_checkpoint(checkpoint), recipe)


def write(checkpoint: Path, out: Path, recipe: Recipe = INT4, *, fresh: bool = False, **how: object) -> None:
    source = open_checkpoint(checkpoint)
    execution = Execution(job_elements=ELEMENTS, sync_bytes=1 << 14, **how)  # type: ignore[arg-type]
    write_bundle(lowered(checkpoint, recipe), source, out, fresh=fresh, how=execution)


def digests(directory: Path) -> dict[str, str]:
    return {record.path: record.sha256 for record in open_bundle(directory).manifest.files}


def children(process: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{process}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(met: Callable[[], bool]) -> None:
    """Wait for a condition that another process brings about."""
    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def cmdline(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()


def finished(directory: Path) -> int:
    """Jobs that the journal of an unfinished compile knows."""
    found = read_journal(directory)
    return len(found.done) if found is not None else 0


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The SHA-256s of a compile that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    write(tiny_checkpoint("guard"), out, executor=Serial())
    return digests(out)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_pool_of_any_size_writes_the_same_bytes(
    tiny_checkpoint: Checkpoint, whole: dict[str, str], tmp_path: Path, workers: int
) -> None:
    write(tiny_checkpoint("guard"), tmp_path, executor=ProcessPool(workers))
    assert digests(tmp_path) == whole


@pytest.mark.parametrize("weights", ["int4", "fp32"])
@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_experts_cut_into_small_jobs_have_the_bytes_of_whole_ones(
    tiny_checkpoint: Checkpoint, tiny_bundle: Callable[[str, str, str], Path], tmp_path: Path, target: str, weights: str
) -> None:
    recipe = Recipe(target=target, weights=weights, group_size=32)
    work = lowered(tiny_checkpoint("scout"), recipe)
    jobs = plan_jobs(work.plan, work.plan.placements(), ELEMENTS)
    experts = [job for job in jobs if ".experts." in job.source.tensor]
    wholes = {(job.source.tensor, job.source.index) for job in experts}
    assert len(experts) >= 2 * len(wholes)
    write(tiny_checkpoint("scout"), tmp_path, recipe)
    assert digests(tmp_path) == digests(tiny_bundle("scout", target, weights))


def test_a_pool_raises_a_damaged_weight_by_name_and_leaves_nothing(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint("guard"), tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.3.self_attn.q_proj.weight"][5, 7] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"q_proj\.weight holds nan"):
        write(tmp_path / "checkpoint", tmp_path / "out", executor=ProcessPool(2))
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_what_is_finished_and_the_same_call_goes_on(
    tiny_checkpoint: Checkpoint, whole: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt, match=r"stopped after 20 of \d+ jobs; the same command goes on"):
        write(tiny_checkpoint("guard"), tmp_path, executor=StopAfter(20, KeyboardInterrupt()))
    with pytest.raises(InputError, match=r"unfinished compile \(20 of \d+ jobs\)"):
        open_bundle(tmp_path)
    seen: list[int] = []

    class Counted:
        def run(self, run_job: RunJob, jobs: Iterable[tuple[int, Job]]) -> Generator[Finished, None, None]:
            for finished in Serial().run(run_job, jobs):
                seen.append(finished[0])
                yield finished

    write(tiny_checkpoint("guard"), tmp_path, executor=Counted())
    assert seen
    assert not set(seen) & set(range(20)), "finished jobs are not run again"
    assert digests(tmp_path) == whole
    assert not (tmp_path / JOURNAL_NAME).exists()


def test_a_full_disk_is_said_and_resumable(
    tiny_checkpoint: Checkpoint, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(10**9))
    pwrite = os.pwrite

    def full(file: int, data: bytes, offset: int) -> int:
        if next(calls) > 50:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(EnvironmentProblem, match=r"disk of .* is full.*\d+ of \d+ jobs are finished"):
            write(tiny_checkpoint("guard"), tmp_path, executor=Serial())
    write(tiny_checkpoint("guard"), tmp_path, executor=Serial())
    assert digests(tmp_path) == whole


def test_half_a_compile_of_another_recipe_is_refused_until_fresh(
    tiny_checkpoint: Checkpoint, whole: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tiny_checkpoint("guard"), tmp_path, INT8, executor=StopAfter(20, KeyboardInterrupt()))
    before = (tmp_path / JOURNAL_NAME).read_bytes()
    with pytest.raises(InputError, match=r"unfinished compile of .*int8.*--fresh"):
        write(tiny_checkpoint("guard"), tmp_path, executor=Serial())
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before
    write(tiny_checkpoint("guard"), tmp_path, fresh=True, executor=Serial())
    assert digests(tmp_path) == whole


def test_a_torn_last_line_does_not_count(tiny_checkpoint: Checkpoint, whole: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tiny_checkpoint("guard"), tmp_path, executor=StopAfter(20, KeyboardInterrupt()))
    journal = tmp_path / JOURNAL_NAME
    journal.write_bytes(journal.read_bytes()[:-10])
    found = read_journal(tmp_path)
    assert found is not None
    assert len(found.done) == 19
    write(tiny_checkpoint("guard"), tmp_path, executor=Serial())
    assert digests(tmp_path) == whole


def test_a_second_compile_into_one_directory_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another corral process is writing"):
            write(tiny_checkpoint("guard"), tmp_path, executor=Serial())
    finally:
        os.close(other)
    assert not any(tmp_path.iterdir())


def test_space_that_is_there_already_is_not_asked_for_again(tmp_path: Path) -> None:
    shards = Shards(tmp_path, {0: 1 << 20, 1: 1 << 20})
    assert shards.missing_bytes() == 2 << 20
    assert shards.prepare() == set()
    shards.write(1, 0, b"x" * (1 << 20))
    assert shards.missing_bytes() <= 1 << 20
    assert shards.prepare() == {0, 1}


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    tiny_checkpoint: Checkpoint, whole: dict[str, str], tmp_path: Path
) -> None:
    """kill -9, twenty times, in one directory; each run goes on from where the last one died."""
    source = open_checkpoint(tiny_checkpoint("guard"))
    work = lowered(tiny_checkpoint("guard"), INT4)
    # Two jobs at a time: some kills fall between bytes and journal.
    how = Execution(job_elements=ELEMENTS, sync_bytes=1 << 11, executor=Slow(0.002))
    moments = random.Random(4)
    context = multiprocessing.get_context("fork")
    reached = [0]
    for _ in range(KILLS):
        process = context.Process(target=write_bundle, args=(work, source, tmp_path), kwargs={"how": how})
        process.start()
        until(lambda: finished(tmp_path) > reached[-1] or not process.is_alive())  # noqa: B023
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        found = read_journal(tmp_path)
        if found is not None:
            assert len(found.done) >= reached[-1], "a finished job is never lost"
            reached.append(len(found.done))
    assert len(set(reached)) > 3, f"the kills came too early or too late to tell anything: {reached}"
    if not (tmp_path / "manifest.json").exists():
        write_bundle(work, source, tmp_path, how=how)
    assert digests(tmp_path) == whole


def test_a_compile_killed_with_its_pool_leaves_no_worker_and_goes_on_to_the_same_bytes(
    tiny_checkpoint: Checkpoint, whole: dict[str, str], tmp_path: Path
) -> None:
    """kill -9 of the compile alone, at random numbers of finished jobs."""
    source, work = open_checkpoint(tiny_checkpoint("guard")), lowered(tiny_checkpoint("guard"), INT4)
    how = Execution(job_elements=ELEMENTS, sync_bytes=1, executor=ProcessPool(2))
    moments = random.Random(5)

    for _ in range(3):
        before, more = finished(tmp_path), moments.randint(1, 60)
        process = multiprocessing.get_context("fork").Process(
            target=write_bundle, args=(work, source, tmp_path), kwargs={"how": how}
        )
        process.start()
        assert process.pid is not None
        until(lambda: finished(tmp_path) >= before + more)  # noqa: B023  # called here, at once
        workers = children(process.pid)
        process.kill()
        process.join()
        assert len(workers) == 2
        until(lambda: not any(map(is_running, workers)))  # noqa: B023
        assert not (tmp_path / "manifest.json").exists()
    write_bundle(work, source, tmp_path, how=how)
    assert digests(tmp_path) == whole


def test_a_killed_worker_is_said_and_the_compile_goes_on_later(
    tiny_checkpoint: Checkpoint, whole: dict[str, str], tmp_path: Path, watched: Callable[..., Any]
) -> None:
    """As the kernel does it where memory runs out."""

    def kill() -> None:
        workers = [p for p in children(os.getpid()) if b"corral.graphs.execute.worker" in cmdline(p)]
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)

    with pytest.raises(
        EnvironmentProblem, match=r"worker process was killed.*smaller --jobs\. \d+ of \d+ jobs are finished"
    ):
        write(tiny_checkpoint("guard"), tmp_path, executor=watched(ProcessPool(2), {30: kill}))
    journal = read_journal(tmp_path)
    assert journal is not None
    assert len(journal.done) >= 29
    rest = watched(Serial())
    write(tiny_checkpoint("guard"), tmp_path, executor=rest)
    assert not set(rest.order) & set(journal.done)
    assert digests(tmp_path) == whole
