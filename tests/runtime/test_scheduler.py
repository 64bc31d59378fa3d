"""The scheduler by itself: requests move on as if a graph had run, and every piece of work is written down."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from corral.runtime.request import Request
from corral.runtime.sampling_params import SamplingParams
from corral.runtime.scheduler import Decode, Move, Prefill, Scheduler

CHUNK = 8


def request(length: int) -> Request:
    return Request((1,) * length, SamplingParams(), max_tokens=99, eos_token_ids=(), decoder=None)


def scheduler(*, max_batch: int = 4, max_waiting: int = 99, step_tokens: int = 6) -> Scheduler:
    return Scheduler(max_batch=max_batch, max_waiting=max_waiting, chunk=CHUNK, step_tokens=step_tokens)


def advance(scheduler: Scheduler) -> Prefill | Decode | None:
    scheduler.admit()
    work = scheduler.schedule()
    if isinstance(work, Prefill):
        work.request.position += work.count
    elif work:
        for running in work.requests:
            running.position += 1
    return work


def counts(scheduler: Scheduler, steps: int) -> list[int]:
    """Tokens of the next pieces: those of a prompt as they are, those of a decode step negative."""
    work = [advance(scheduler) for _ in range(steps)]
    return [piece.count if isinstance(piece, Prefill) else -len(piece.requests) if piece else 0 for piece in work]


def test_a_long_prompt_is_read_between_the_steps_of_who_writes() -> None:
    line = scheduler()
    line.add(request(3))
    assert counts(line, 2) == [3, -1]
    line.add(request(20))
    # 6 tokens a round, one of them written; 8 is a chunk boundary, and a piece that ends there leaves some for another.
    assert counts(line, 8) == [5, -1, 3, 2, -1, 5, -1, 1]


def test_nobody_who_writes_means_nothing_to_wait_for() -> None:
    line = scheduler()
    line.add(request(20))
    assert counts(line, 5) == [6, 2, 6, 2, 4]


def test_short_prompts_share_a_round() -> None:
    line = scheduler()
    for _ in range(3):
        line.add(request(2))
    assert counts(line, 6) == [2, 2, 2, -3, -3, -3]


def test_many_who_write_do_not_starve_who_reads() -> None:
    line = scheduler(step_tokens=2)
    for length in (1, 1, 1, 4):
        line.add(request(length))
    assert counts(line, 11) == [1, 1, -2, 1, -3, 1, -3, 1, -3, 1, -3]


def test_the_line_is_bounded_and_takes_more_when_it_moves() -> None:
    line = scheduler(max_batch=1, max_waiting=2)
    first, second, third = (request(2) for _ in range(3))
    assert line.add(first)
    line.admit()
    assert [line.add(second), line.add(third), line.add(request(2))] == [True, True, False]
    assert line.remove(third) == []
    assert line.add(request(2))


def test_who_reads_stays_behind_who_writes_when_a_hole_is_closed() -> None:
    line = scheduler()
    requests = [request(1) for _ in range(3)]
    for one in requests:
        line.add(one)
        advance(line)
    line.add(reading := request(30))
    advance(line)
    assert line.running == [*requests, reading]
    assert line.remove(requests[0]) == [Move(2, 0), Move(3, 2)]
    assert line.running == [requests[2], requests[1], reading]
    assert line.remove(requests[1]) == [Move(2, 1)]
    assert line.remove(reading) == []
    assert line.running == [requests[2]]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    step_tokens=st.integers(1, 12),
    max_batch=st.integers(1, 4),
)
def test_rounds_are_bounded_in_order_of_arrival_and_nobody_waits_for_ever(
    lengths: list[int], step_tokens: int, max_batch: int
) -> None:
    line = scheduler(max_batch=max_batch, step_tokens=step_tokens)
    requests = [request(length) for length in lengths]
    for one in requests:
        line.add(one)
    read_first: list[Request] = []
    since_decode = 0
    while not line.idle:
        work = advance(line)
        assert work is not None
        if isinstance(work, Prefill):
            assert work.slot == line.running.index(work.request)
            assert (work.request.position - 1) // CHUNK == (work.request.position - work.count) // CHUNK
            since_decode += work.count if len(line.running) > 1 else 0  # as many tokens as somebody was held up by
            read_first += [work.request] if work.request not in read_first else []
            continue
        assert list(work.requests) == line.running[: len(work.requests)]
        assert all(one.prefilled for one in work.requests)
        assert since_decode <= step_tokens
        since_decode = 0
        for one in list(line.running):
            if one.position >= len(one.prompt_ids) + 3:
                line.remove(one)
    assert read_first == requests
