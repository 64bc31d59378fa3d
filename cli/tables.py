"""The one way tables and JSON are printed: colours on a terminal only, never cut off where nobody set a width."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.padding import Padding

INDENT, GAP = 3, 2
PIPE_WIDTH = 1000  # columns: a pipe has none, and a program that reads it wants whole rows
# Before "± 0.2" and "(395 to 412)".
SPREAD = re.compile(r" (?=[±(])")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Column titles and rows of text; a title that ends in ">" (not shown) is aligned right."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]


def print_table(table: Table) -> None:
    """Print a table on stdout; where a terminal is too narrow, spreads go below their values."""
    from rich.console import Console

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH
    console = Console(file=sys.stdout, width=width, highlight=False)
    shown = _shown(table)
    if console.measure(shown, options=console.options.update(width=PIPE_WIDTH)).maximum > width:
        shown = _shown(Table(columns=table.columns, rows=[[SPREAD.sub("\n", cell) for cell in r] for r in table.rows]))
    console.print(shown)


def _shown(table: Table) -> Padding:
    from rich.padding import Padding
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for column in table.columns:
        right = column.endswith(">")
        shown.add_column(column.rstrip(">"), justify="right" if right else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return Padding(shown, (0, 0, 0, INDENT), expand=False)


def print_json(data: Any) -> None:
    """Print JSON on stdout, indented; standard JSON only (no NaN)."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))
