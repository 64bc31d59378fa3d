"""Executors that tests watch and disturb; the demo model lowered for TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from corral.graphs.execute.executors import Executor, Finished, RunJob
from corral.graphs.execute.job import Job

DEMO = Path(__file__).parents[2] / "demo" / "demo-scout"


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


@pytest.fixture(scope="session")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`lowered("int4")` -> the demo model lowered for TensorRT, without engines; made once. Do not write into it.

    "fp8 int4": experts in int4, all else in FP8.
    """
    made: dict[str, Path] = {}

    def make(weights: str) -> Path:
        from corral.graphs import compile
        from corral.spec.recipe import Recipe
        from corral.spec.rule import Rule

        if weights not in made:
            made[weights] = tmp_path_factory.mktemp(weights.replace(" ", "-")) / "demo"
            all_else, _, experts = weights.partition(" ")
            rules = (Rule(matrices="*.experts.*", weights=experts),) if experts else ()
            how = Recipe(target="tensorrt-rtx", weights=all_else, group_size=64, calibration_tokens=1024, rules=rules)
            compile(DEMO, made[weights], how)
        return made[weights]

    return make
