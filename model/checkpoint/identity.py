"""A checkpoint's identity: a short name that changes when its config, its tensors or one of its files does."""

from __future__ import annotations

import hashlib

from corral.model.checkpoint.checkpoint import Checkpoint


def checkpoint_identity(checkpoint: Checkpoint) -> str:
    """SHA-256 over config, tensor headers, and each file's name, size and modification time. Reads no weight.

    Where the checkpoint lies does not count: it may be moved with its times.
    """
    digest = hashlib.sha256(repr(checkpoint.config).encode())
    tensors = checkpoint.tensors
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape} {tensors[name].file.name}\n".encode())
    for file in sorted({file for info in tensors.values() for file in info.files}):
        if file.exists():  # values may come from elsewhere than from files
            found = file.stat()
            digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()
