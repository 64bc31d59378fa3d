"""The demo's text: the source of Python's standard library, training and held-out files chosen by a hash of their paths."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

# Left out: not Python that a person wrote (tables, generated text), or not part of the library.
EXCLUDED = ("site-packages", "encodings", "pydoc_data", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__")
LARGEST_FILE = 400_000  # bytes; beyond it are data tables
HELD_OUT_PER_MILLE = 18
CALIBRATION_CHARACTERS = 256_000
CALIBRATION_FILES = 2_000, 16_000  # bytes


def source_files() -> list[Path]:
    """Every library source file that is text of a sensible size, in a stable order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in sorted(root.rglob("*.py")) if not set(path.relative_to(root).parts) & set(EXCLUDED))
    return [path for path in files if 0 < path.stat().st_size <= LARGEST_FILE and _is_utf8(path)]


def is_held_out(path: Path) -> bool:
    """Whether a file belongs to the held-out part: a stable choice by its path, among non-test modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    name = path.relative_to(root).as_posix()
    if "test" in path.relative_to(root).parts:
        return False
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 1000 < HELD_OUT_PER_MILLE


def split() -> tuple[list[str], list[str]]:
    """(training texts, held-out texts)."""
    train: list[str] = []
    held_out: list[str] = []
    for path in source_files():
        (held_out if is_held_out(path) else train).append(path.read_text(encoding="utf-8"))
    return train, held_out


def calibration_text() -> str:
    """Whole training files of ordinary size, chosen by a hash of their paths, until there are CALIBRATION_CHARACTERS."""
    root = Path(sysconfig.get_paths()["stdlib"])
    chosen = sorted(
        (path for path in source_files() if not is_held_out(path) and "test" not in path.relative_to(root).parts),
        key=lambda path: hashlib.sha256(b"calibration " + path.relative_to(root).as_posix().encode()).digest(),
    )
    texts: list[str] = []
    for path in chosen:
        if CALIBRATION_FILES[0] <= path.stat().st_size <= CALIBRATION_FILES[1]:
            texts.append(path.read_text(encoding="utf-8"))
        if sum(map(len, texts)) >= CALIBRATION_CHARACTERS:
            break
    return "\n".join(texts)


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


if __name__ == "__main__":  # writes the calibration text that corral ships
    Path("graphs/calibrate/python-library.txt").write_text(calibration_text(), encoding="utf-8")
