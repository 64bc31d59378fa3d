"""Size and SHA-256 of the files of a bundle, several at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from corral.spec.manifest import FileRecord
from corral.spec.progress import Progress, silent

PIECE_BYTES = 4 << 20


def hash_files(
    directory: Path, names: Sequence[str], *, threads: int = 1, progress: Progress = silent
) -> tuple[FileRecord, ...]:
    """A record of each file, in the order of `names`. Threads suffice: hashing and reading leave Python to others."""
    total = sum((directory / name).stat().st_size for name in names)
    done, lock = 0, Lock()

    def record(name: str) -> FileRecord:
        nonlocal done
        digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(PIECE_BYTES))
        with (directory / name).open("rb", buffering=0) as file:
            while read := file.readinto(buffer):
                digest.update(buffer[:read])
                size += read
                with lock:
                    done += read
                    progress("hash files", done, total, "bytes")
        return FileRecord(path=name, bytes=size, sha256=digest.hexdigest())

    with ThreadPoolExecutor(max_workers=threads) as pool:
        return tuple(pool.map(record, names))
