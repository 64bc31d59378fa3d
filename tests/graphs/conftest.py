"""Executors that tests watch and disturb."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field

import pytest

from corral.graphs.execute.executors import Executor, Finished, RunJob
from corral.graphs.execute.job import Job


@dataclass
class Watched:
    """An executor that notes the order in which jobs are finished, and calls `then[n]` when n of them are."""

    executor: Executor
    then: Mapping[int, Callable[[], object]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)

    def run(self, run_job: RunJob, jobs: Iterable[tuple[int, Job]]) -> Generator[Finished, None, None]:
        for finished in self.executor.run(run_job, jobs):
            self.order.append(finished[0])
            if len(self.order) in self.then:
                self.then[len(self.order)]()
            yield finished


@pytest.fixture
def watched() -> type[Watched]:
    """`watched(executor, {20: function})`."""
    return Watched
