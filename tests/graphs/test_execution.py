"""How many processes a compile takes: cores, memory, work and jobs each limit it."""

from __future__ import annotations

import pytest

from corral.graphs.execute.execution import ELEMENTS_WORTH_A_WORKER, Execution
from corral.graphs.execute.executors import Serial
from corral.graphs.execute.job import Job
from corral.graphs.execute.process_pool import ProcessPool
from corral.spec.errors import InputError
from corral.spec.weight_plan import JOB_BYTES_PER_ELEMENT, JOB_ELEMENTS, PROCESS_BYTES, Source

LARGE = Job(Source("w", rows=(0, JOB_ELEMENTS)), ())
PLENTY = 1 << 50


def jobs(elements: int) -> list[Job]:
    return [LARGE] * (elements // JOB_ELEMENTS)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Eight cores and more memory than anybody needs."""
    monkeypatch.setattr("corral.graphs.execute.execution.usable_cores", lambda: 8)
    monkeypatch.setattr("corral.graphs.execute.execution.usable_memory", lambda: PLENTY)
    return monkeypatch


@pytest.mark.usefixtures("machine")
def test_every_core_has_a_worker() -> None:
    assert Execution().workers(jobs(1 << 36)) == 8


@pytest.mark.parametrize("fits", [1, 3])
def test_memory_limits(machine: pytest.MonkeyPatch, fits: int) -> None:
    worker = PROCESS_BYTES + JOB_ELEMENTS * JOB_BYTES_PER_ELEMENT  # what the largest job needs
    machine.setattr("corral.graphs.execute.execution.usable_memory", lambda: fits * worker + worker - 1)
    assert Execution().workers([*jobs(1 << 36), Job(Source("w", rows=(0, 1)), ())]) == fits
    machine.setattr("corral.graphs.execute.execution.usable_memory", lambda: 0)
    assert Execution().workers(jobs(1 << 36)) == 1


@pytest.mark.usefixtures("machine")
def test_a_worker_must_be_worth_its_start() -> None:
    assert Execution().workers(jobs(5 * ELEMENTS_WORTH_A_WORKER)) == 5
    assert Execution().workers(jobs(ELEMENTS_WORTH_A_WORKER // 2)) == 1
    assert Execution().workers([]) == 1


@pytest.mark.usefixtures("machine")
def test_what_was_asked_for_counts_alone_but_no_worker_is_idle() -> None:
    assert Execution(jobs=20).workers(jobs(1 << 36)) == 20
    assert Execution(jobs=20).workers([LARGE] * 3) == 3
    assert Execution(jobs=2).executor_for([LARGE] * 3) == ProcessPool(2)
    assert Execution(jobs=1).executor_for([LARGE] * 3) == Serial()
    assert [str(who) for who in (Serial(), ProcessPool(1), ProcessPool(3))] == ["1 process", "1 process", "3 processes"]
    with pytest.raises(InputError, match="--jobs is 0; expected at least 1"):
        Execution(jobs=0)
