"""How long work reports: one callable, so that no layer below the CLI knows about terminals."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with what is being done, how much of `total` is done, and its unit ("jobs", "bytes", "tokens")."""

    def __call__(self, what: str, done: float, total: float, unit: str) -> None: ...


def silent(what: str, done: float, total: float, unit: str) -> None:
    """The Progress that says nothing."""
