"""Size and SHA-256 of the files of a bundle, several at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from corral.spec.bundle import file_sha256
from corral.spec.manifest import FileRecord
from corral.spec.progress import Progress, silent


def hash_files(
    directory: Path, names: Sequence[str], *, threads: int = 1, progress: Progress = silent
) -> tuple[FileRecord, ...]:
    """A record of each file, in the order of `names`. Threads suffice: hashing and reading leave Python to others."""
    total = sum((directory / name).stat().st_size for name in names)
    done, lock = 0, Lock()

    def report(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            progress("hash files", done, total, "bytes")

    def record(name: str) -> FileRecord:
        path = directory / name
        return FileRecord(path=name, bytes=path.stat().st_size, sha256=file_sha256(path, report))

    with ThreadPoolExecutor(max_workers=threads) as pool:
        return tuple(pool.map(record, names))
