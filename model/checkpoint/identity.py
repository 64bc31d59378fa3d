"""A checkpoint's identity: a short name that changes when its config, its tensors or one of its files does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.store import TensorInfo


def checkpoint_identity(checkpoint: Checkpoint) -> str:
    """SHA-256 over config, tensor headers, and each file's name, size and modification time. Reads no weight.

    Where the checkpoint lies does not count: it may be moved with its times.
    """
    digest = hashlib.sha256(repr(checkpoint.config).encode())
    tensors = checkpoint.tensors
    for name in sorted(tensors):
        for info in _stored(tensors[name]):
            digest.update(f"{info.name} {info.dtype} {info.shape} {info.published} {info.file.name}\n".encode())
    for file in _files(checkpoint):
        found = file.stat()
        digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def last_change(checkpoint: Checkpoint) -> int:
    """When the newest file of weights was written, in nanoseconds; 0 where there are no files."""
    return max((file.stat().st_mtime_ns for file in _files(checkpoint)), default=0)


def _files(checkpoint: Checkpoint) -> list[Path]:
    tensors = checkpoint.tensors.values()
    files = {file for tensor in tensors for info in _stored(tensor) for file in info.files}
    return sorted(file for file in files if file.exists())  # values may come from elsewhere than from files


def _stored(tensor: TensorInfo) -> Iterator[TensorInfo]:
    """A tensor, and all that it is made of."""
    yield tensor
    for part in tensor.parts:
        yield from _stored(part)
