"""One small unit of a plan's execution: a slice of the checkpoint is read once and every stored form of it computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corral.graphs.execute.steps import STEPS
from corral.spec.errors import InputError
from corral.spec.weight_plan import (
    JOB_BYTES_PER_ELEMENT,
    JOB_ELEMENTS,
    STATISTICS_BYTES_PER_SQUARE,
    Entry,
    Placement,
    Source,
    Step,
    WeightPlan,
)

# What the statistics of a calibration say of one source: arrays by name.
ReadStatistics = Callable[[Source], Mapping[str, NDArray[Any]]]

# Reads a source: its values, float32, or with `as_stored` its codes and scales by name (`Checkpoint.read_piece`).
ReadPiece = Callable[[Source], NDArray[np.float32] | Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class Output:
    """Where a job's bytes for one entry go, and the steps that make them."""

    entry: str
    shard: int
    offset: int
    nbytes: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Job:
    """Read `source`, make each of `outputs`. Plain data: it pickles, and it does not know who runs it."""

    source: Source
    outputs: tuple[Output, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.source.shape)

    @property
    def peak_bytes(self) -> int:
        """Memory that the job needs at most."""
        solves = any(step.name == "gptq" for output in self.outputs for step in output.steps)
        statistics = STATISTICS_BYTES_PER_SQUARE * self.source.shape[-1] ** 2 if solves else 0
        return self.elements * JOB_BYTES_PER_ELEMENT + statistics


def plan_jobs(plan: WeightPlan, placements: Mapping[str, Placement], limit: int = JOB_ELEMENTS) -> list[Job]:
    """Cut a plan into jobs, in the order of its entries; entries that read the same source share its jobs."""
    readers: dict[Source, list[tuple[Entry, Output]]] = {}
    for entry in plan:
        place = placements[entry.name]
        elements = sum(math.prod(piece.shape) for piece in entry.pieces)
        offset = place.offset
        for piece in entry.pieces:
            nbytes = entry.nbytes * math.prod(piece.shape) // elements
            output = Output(entry.name, place.shard, offset, nbytes, entry.steps)
            readers.setdefault(piece, []).append((entry, output))
            offset += nbytes
        assert offset == place.offset + entry.nbytes, entry.name
    return [job for source, group in readers.items() for job in _cut(source, group, limit)]


def _cut(source: Source, group: list[tuple[Entry, Output]], limit: int) -> Iterator[Job]:
    whole = Job(source, tuple(output for _, output in group))
    axes = {entry.cut for entry, _ in group}
    axis = axes.pop() if len(axes) == 1 else None
    if axis is None or whole.elements <= limit:
        yield whole
        return
    start, stop = getattr(source, axis)
    multiple = math.lcm(*(entry.cut_multiple for entry, _ in group))
    per_line = whole.elements // (stop - start)
    size = max(multiple, limit // per_line // multiple * multiple)
    for first in range(start, stop, size):
        last = min(first + size, stop)
        outputs = tuple(
            dataclasses.replace(
                output,
                offset=output.offset + output.nbytes * (first - start) // (stop - start),
                nbytes=output.nbytes * (last - first) // (stop - start),
            )
            for _, output in group
        )
        changes: dict[str, Any] = {axis: (first, last)}
        yield Job(dataclasses.replace(source, **changes), outputs)


def run_job(job: Job, read: ReadPiece, read_statistics: ReadStatistics | None = None) -> list[tuple[Output, bytes]]:
    """Execute a job. Steps that several outputs begin with are computed once.

    Where a step names statistics (by the argument `statistics`), it is given what those say of the job's source.
    """
    source = read(job.source)
    results: dict[Any, Any] = {}
    finished = []
    for output in job.outputs:
        value: Any = source
        for i, step in enumerate(output.steps):
            key = (output.steps[:i], step.name, step.args)
            if key not in results:
                try:
                    results[key] = STEPS[step.name](value, **_arguments(step, job.source, read_statistics))
                except InputError as error:
                    raise InputError(f"{job.source.tensor} {error}") from None
            value = results[key][step.output] if step.output else results[key]
        data = np.ascontiguousarray(value).tobytes()
        if len(data) != output.nbytes:
            raise AssertionError(f"{output.entry}: steps made {len(data)} bytes, the plan says {output.nbytes}")
        finished.append((output, data))
    return finished


def _arguments(step: Step, source: Source, read_statistics: ReadStatistics | None) -> dict[str, Any]:
    arguments: dict[str, Any] = dict(step.args)
    if "statistics" in arguments:
        if read_statistics is None:
            raise AssertionError(f"{step} needs statistics, and none were gathered")
        arguments["statistics"] = read_statistics(source)
    return arguments
