"""The directory that a bundle is written into: whose it may be, that nobody else writes it, and what stays on failure.

Bad input leaves nothing. A kill, Ctrl-C, a full disk or a lost worker leave what is finished and the journal of it, and
the same command goes on from there. Nothing that corral did not write is ever touched.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from corral.graphs.execute.journal import Journal, open_journal
from corral.graphs.execute.shards import PARTIAL
from corral.spec.errors import CorralError, EnvironmentProblem, InputError
from corral.spec.manifest import MANIFEST_NAME
from corral.spec.unfinished import JOURNAL_NAME

GRAPH_FILE, PLAN_FILE, TOKENIZER_FILE, TEMPLATE_FILE = (
    "decoder.onnx",
    "plan.json",
    "tokenizer.json",
    "chat_template.jinja",
)
# What has a number in its name.
OURS = re.compile(r"weights-\d+\.bin|decoder-\d+\.onnx|[\w.-]+\.engine(\.json)?|(statistics|hidden)-[0-9a-f]{16}-.*")
STATISTICS = re.compile(r"(statistics|hidden)-[0-9a-f]{16}-.*(?<!\.partial)")


def stage_file(stage: int) -> str:
    """The graph's file name of one of several stages."""
    return f"decoder-{stage:02d}.onnx"


def check_out(out: Path, *, fresh: bool) -> None:
    """Raise InputError unless a bundle may be written to `out`: new, empty, an unfinished compile, or with `fresh` a bundle."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file; expected a directory to write the bundle into. Choose another -o.")
    with locked(out):
        _check_content(out, fresh=fresh)


@contextmanager
def bundle_directory(out: Path, *, key: str, what: str, jobs: int, fresh: bool) -> Iterator[Journal]:
    """Hold `out` for writing the compile named `key`, with its journal; when the block ends the bundle is complete.

    Raises InputError where `out` holds something else, another compile's half, or is being written.
    """
    existed = out.exists()
    if existed and not out.is_dir():
        check_out(out, fresh=fresh)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"{out} cannot be made: {error}.") from error
    with locked(out):
        _check_content(out, fresh=fresh)
        if fresh:
            _remove_files(out)
        try:
            journal = open_journal(out, key, what, jobs)
        except OSError as error:
            raise _disk_problem(out, error, "") from error
        try:
            yield journal
        except BaseException as error:
            calibrated = any(STATISTICS.fullmatch(path.name) for path in out.iterdir())
            if isinstance(error, InputError) or not (journal.done or calibrated):
                _remove_files(out)
                if not existed:
                    out.rmdir()
                raise _explained(out, error, None) from error
            raise _explained(out, error, journal) from error
        (out / (JOURNAL_NAME + PARTIAL)).unlink(missing_ok=True)
        journal.path.unlink()


def _check_content(out: Path, *, fresh: bool) -> None:
    names = [path.name for path in out.iterdir()]
    if MANIFEST_NAME in names:
        if not fresh:
            raise InputError(f"{out} holds a bundle already. Choose another -o, or add --fresh to replace it.")
    elif names and JOURNAL_NAME not in names and not all(name.startswith(JOURNAL_NAME) for name in names):
        raise InputError(
            f"{out} holds something that is no bundle ({names[0]}, …); it is left as it is. "
            "Choose another -o, or an empty directory."
        )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the directory's lock, which ends with the process that has it, even with `kill -9`."""
    directory = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another corral process is writing {out} right now. Wait for it to end, or choose another -o."
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(directory)


def write_file(out: Path, name: str, data: bytes) -> str:
    """Write a small file under a temporary name, synced and renamed; returns its name."""
    path = out / (name + PARTIAL)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path, out / name)
    return name


def _remove_files(out: Path) -> None:
    """Remove what corral writes, the journal last, and nothing else."""
    ours = (GRAPH_FILE, PLAN_FILE, TOKENIZER_FILE, TEMPLATE_FILE)
    # A bundle's manifest goes first: what is left is then not taken for a bundle.
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for path in list(out.iterdir()):
        name = path.name.removesuffix(PARTIAL)
        if name in (*ours, MANIFEST_NAME) or OURS.fullmatch(name):
            path.unlink()
    for name in (JOURNAL_NAME + PARTIAL, JOURNAL_NAME):
        (out / name).unlink(missing_ok=True)


def _explained(out: Path, error: BaseException, journal: Journal | None) -> BaseException:
    """The error as the user should meet it; `journal` is given where the same command goes on."""
    if isinstance(error, KeyboardInterrupt) and journal is not None:
        return KeyboardInterrupt(f"stopped after {journal}; the same command goes on from here.")
    kept = f" {journal} are finished, and the same command goes on." if journal is not None else ""
    if isinstance(error, EnvironmentProblem):
        return EnvironmentProblem(f"{error}{kept}")
    if isinstance(error, OSError) and not isinstance(error, CorralError):
        return _disk_problem(out, error, kept)
    return error


def _disk_problem(out: Path, error: OSError, kept: str) -> EnvironmentProblem:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        nothing = "" if kept else " Nothing was left there."
        return EnvironmentProblem(
            f"the disk of {out} is full. Make room and run the same command again.{kept}{nothing}"
        )
    return EnvironmentProblem(f"{out} cannot be written: {error}.{kept}")
