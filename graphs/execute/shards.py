"""Weight shards being written: bytes land at their offsets in temporary files, which are renamed when complete."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from corral.spec.weight_plan import Placement

PARTIAL = ".partial"


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"weights-{shard:05d}.bin"


def shard_sizes(placements: Mapping[str, Placement]) -> dict[int, int]:
    """Bytes of each shard."""
    sizes: dict[int, int] = {}
    for place in placements.values():
        sizes[place.shard] = max(sizes.get(place.shard, 0), place.offset + place.nbytes)
    return sizes


@dataclass(frozen=True)
class Shards:
    """The shards of a plan in `directory`, until `finish` under temporary names. Holds no open file: it pickles."""

    directory: Path
    sizes: Mapping[int, int]
    durable: bool = False  # what is written is on the disk when `write` returns, and not only in this machine's memory

    def partial(self, shard: int) -> Path:
        return self.directory / (shard_name(shard) + PARTIAL)

    def missing_bytes(self) -> int:
        """Disk space that the shards still need, net of what is there."""
        return sum(max(0, size - _allocated(self.partial(shard))) for shard, size in self.sizes.items())

    def prepare(self) -> set[int]:
        """Create what is not there, its disk space reserved; returns the shards that an earlier compile left."""
        kept = set()
        for shard, size in self.sizes.items():
            path, finished = self.partial(shard), self.directory / shard_name(shard)
            if finished.exists():  # stopped between the renames and the manifest
                os.replace(finished, path)
            if path.is_file() and path.stat().st_size == size:
                kept.add(shard)
            else:
                path.unlink(missing_ok=True)
            _reserve(path, size)
        return kept

    def write(self, shard: int, offset: int, data: bytes) -> None:
        """Put bytes at their place; any process may, at any time."""
        file = os.open(self.partial(shard), os.O_WRONLY | (os.O_DSYNC if self.durable else 0))
        try:
            view = memoryview(data)
            while view:
                written = os.pwrite(file, view, offset)
                view, offset = view[written:], offset + written
        finally:
            os.close(file)

    def sync(self, shards: Iterable[int]) -> None:
        """Make durable what was written to `shards`, by whichever process."""
        for shard in shards:
            file = os.open(self.partial(shard), os.O_WRONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)

    def finish(self) -> list[str]:
        """Make the shards durable under their own names, and return those."""
        self.sync(self.sizes)
        for shard in self.sizes:
            os.replace(self.partial(shard), self.directory / shard_name(shard))
        return [shard_name(shard) for shard in self.sizes]


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def _reserve(path: Path, size: int) -> None:
    """Take the disk space now, so that a full disk shows at the start; where that is unknown, only set the length."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if size and hasattr(os, "posix_fallocate") and _allocated(path) < size:
            try:
                os.posix_fallocate(file, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        os.ftruncate(file, size)
    finally:
        os.close(file)
