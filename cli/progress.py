"""`Progress` on stderr: a live bar on a terminal; elsewhere a plain line every two seconds, and none for quick work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from corral.cli.formats import count, seconds, size
from corral.spec.progress import Progress

if TYPE_CHECKING:
    from rich.progress import TaskID

EVERY = 2.0  # seconds
# How numbers of a unit read, and what stands behind them; any other unit is counted in full.
UNITS: dict[str, tuple[Callable[[float], str], str]] = {"bytes": (size, ""), "parameters": (count, " parameters")}


def amount(done: float, total: float, unit: str) -> str:
    """How far work is: "61.0 GB of 120.0 GB", "412 of 768 jobs"; "" where nobody knows."""
    if not total:
        return ""
    written, behind = UNITS.get(unit, ("{:,.0f}".format, f" {unit}"))
    return f"{written(done)} of {written(total)}{behind}"


def rate(unit: str, per_second: float | None) -> str:
    """How fast work goes: "187.0 M parameters/s"; "" where nobody knows, and for units that are merely counted."""
    if not per_second or unit not in UNITS:
        return ""
    written, behind = UNITS[unit]
    return f"{written(per_second)}{behind}/s"


def time_left(left: float, per_second: float) -> str:
    """How long it goes on at this speed: "12 min left"; "" where nobody knows, and at the end."""
    return f"{seconds(left / per_second)} left" if left > 0 and per_second > 0 else ""


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Yield a Progress that shows on stderr; a bar is gone afterwards, and results stay alone on the screen."""
    if not sys.stderr.isatty():
        yield plain_progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("  {task.description:<12}"),
        BarColumn(bar_width=28),
        TextColumn("{task.fields[amount]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with RichProgress(*columns, console=Console(file=sys.stderr), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: float, total: float, unit: str) -> None:
            if what not in tasks:
                # What an earlier run has done does not count as speed.
                tasks[what] = bars.add_task(what, total=total or None, completed=int(done), amount="", rate="")
            speed = next((task.speed for task in bars.tasks if task.id == tasks[what]), None)
            bars.update(
                tasks[what],
                completed=done,
                total=total or None,
                amount=amount(done, total, unit),
                rate=rate(unit, speed),
            )

        yield report


def plain_progress(
    *,
    clock: Callable[[], float] = time.monotonic,
    write: Callable[[str], None] = lambda line: click.echo(line, err=True),
) -> Progress:
    """A Progress of whole lines, for logs and pipes."""
    last = clock()
    began: dict[str, tuple[float, float]] = {}  # when, and what an earlier run had done: that does not count as speed
    reached: dict[str, float] = {}

    def report(what: str, done: float, total: float, unit: str) -> None:
        nonlocal last
        now = clock()
        if done < reached.get(what, float("inf")):  # new, or from the start again
            began[what] = now, done
        reached[what] = done
        since, before = began[what]
        if now - last >= EVERY:
            last = now
            speed = (done - before) / (now - since) if now > since else 0.0
            parts = (amount(done, total, unit), rate(unit, speed), time_left(total - done, speed))
            write(" ".join([what, ", ".join(filter(None, parts))]).rstrip())

    return report
