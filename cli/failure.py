"""An exception -> one paragraph for a person, and an exit code: a table. What is not in it is a defect of corral."""

from __future__ import annotations

import errno
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import click

from corral.spec.errors import CorralError, EnvironmentProblem, InputError

INTERRUPTED = 130  # 128 + SIGINT, as shells count
WIDEST = 100  # columns

# Module -> what installs it. A base package can be missing, too, where somebody has uninstalled it.
INSTALLED_BY = (
    dict.fromkeys(
        ("huggingface_hub", "ml_dtypes", "onnx", "onnx_ir", "onnxscript", "safetensors", "torch"), "corral[compile]"
    )
    | dict.fromkeys(("jinja2", "numpy", "onnxruntime", "rich", "tokenizers"), "corral")
    | {"ray": "corral[ray]", "vl_convert": "corral[report]", "lm_eval": "corral[tasks]"}
)


@dataclass(frozen=True)
class Failure:
    """What is said, and the exit code."""

    message: str
    exit_code: int


def _corral(error: CorralError) -> Failure:
    return Failure(str(error), error.exit_code)


def _usage(error: click.ClickException) -> Failure:
    context = getattr(error, "ctx", None)
    name = context.command_path if context is not None else "corral"
    return Failure(f"{error.format_message()} Run `{name} --help` to see what there is.", InputError.exit_code)


def _missing_module(error: ModuleNotFoundError) -> Failure | None:
    module = (error.name or "").partition(".")[0]
    if module not in INSTALLED_BY:
        return None
    return Failure(
        f"the Python package {module} is missing, and this command needs it. Install it with "
        f'`pip install "{INSTALLED_BY[module]}"`.',
        EnvironmentProblem.exit_code,
    )


def _memory(error: MemoryError) -> Failure:
    detail = f" ({error})" if str(error) else ""
    return Failure(
        f"memory ran out{detail}. `corral doctor` shows how much there is; close other programs or use a larger machine.",
        EnvironmentProblem.exit_code,
    )


def _system(error: OSError) -> Failure | None:
    advice = {
        errno.ENOSPC: "the disk is full. Free some space, or write elsewhere with -o.",
        errno.EDQUOT: "the disk quota is used up. Free some space, or write elsewhere with -o.",
        errno.EACCES: "permission denied. Choose a place that you may read and write.",
        errno.EROFS: "the file system is read-only. Write elsewhere with -o.",
        errno.EMFILE: "too many open files. Raise the limit with `ulimit -n 4096`.",
    }
    if error.errno not in advice:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return Failure(where + advice[error.errno], EnvironmentProblem.exit_code)


def _encoding(error: UnicodeDecodeError) -> Failure:
    return Failure(
        f"the input is not UTF-8 text (byte {error.object[error.start]:#04x} at offset {error.start}). Convert it first.",
        InputError.exit_code,
    )


# The first row whose type fits is asked.
EXPLANATIONS: tuple[tuple[type[Exception], Callable[..., Failure | None]], ...] = (
    (CorralError, _corral),
    (click.ClickException, _usage),
    (ModuleNotFoundError, _missing_module),
    (MemoryError, _memory),
    (OSError, _system),
    (UnicodeDecodeError, _encoding),
)


def explain(error: Exception) -> Failure | None:
    """What to tell the user about `error`; None where only a traceback will do."""
    return next((explanation(error) for kind, explanation in EXPLANATIONS if isinstance(error, kind)), None)


def show(failure: Failure, *, prefix: str = "error: ") -> int:
    """Print a failure on stderr, wrapped on a terminal and one line elsewhere; return its exit code."""
    text = prefix + " ".join(failure.message.split())
    if sys.stderr.isatty():
        width = min(shutil.get_terminal_size().columns, WIDEST)
        text = textwrap.fill(
            text, width, subsequent_indent=" " * len(prefix), break_long_words=False, break_on_hyphens=False
        )
    click.echo(text, err=True)
    return failure.exit_code
