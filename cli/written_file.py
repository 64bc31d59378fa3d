"""The file that an option names: refused before any work where it cannot be, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from corral.cli.formats import size
from corral.spec.errors import EnvironmentProblem, InputError


def check_place(path: Path, option: str) -> None:
    """Raise InputError unless a file can be at `path`."""
    if path.is_dir() or not path.parent.is_dir():
        found = "is a directory" if path.is_dir() else "lies in no such directory"
        raise InputError(f"{option} {path} {found}, expected the name of a file in a directory that is there.")


def write_named(path: Path, option: str, data: bytes, use: str) -> str:
    """Write `data`; returns what to say: the file, its size and what it is for."""
    from corral.graphs.out_directory import write_file

    check_place(path, option)
    try:
        write_file(path.parent, path.name, data)
    except OSError as error:
        raise EnvironmentProblem(f"{path} cannot be written: {error}. Choose another {option}.") from None
    return f"{path}: {size(len(data))}, {use}"
