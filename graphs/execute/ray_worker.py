"""What a Ray worker does: see once that it sees what the compile sees, then run jobs."""

from __future__ import annotations

import functools
import hashlib
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corral.graphs.execute.executors import RunJob
from corral.graphs.execute.job import Job
from corral.graphs.execute.worker import keep_freed_memory, sendable
from corral.spec.errors import EnvironmentProblem
from corral.spec.weight_plan import Source


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all workers are given, and what a worker must find before it may run jobs."""

    run_job: RunJob
    corral: str  # version
    here: str  # the compile's working directory, which relative paths start from
    nonce: tuple[Path, bytes] | None  # a file in the output directory, and what it says
    sample: tuple[Source, str]  # a small piece of the checkpoint, and its SHA-256


def run(shared: list[Any], job: Job) -> tuple[str, ...] | BaseException:
    """The job's digests, or the error that it met. `shared` holds the reference of a `Shared`."""
    try:
        return _arrive(shared[0]).run_job(job)
    except Exception as error:
        return sendable(error)


@functools.cache  # once in each process, which serves one compile only
def _arrive(reference: Any) -> Shared:
    import ray
    import torch

    shared: Shared = ray.get(reference)
    torch.set_num_threads(1)  # the workers are the parallelism
    keep_freed_memory()
    with suppress(OSError):  # where it is missing, and paths are relative, the checks say so
        os.chdir(shared.here)
    if complaint := complain(shared):
        node = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
        raise EnvironmentProblem(
            f"the Ray node {node} {complaint}. Every node needs the checkpoint and the output directory on a file system "
            "that all share, under the same paths, and the same corral."
        )
    return shared


def complain(shared: Shared) -> str | None:
    """What this machine does not see as the compile does; None where all is well."""
    if version("corral") != shared.corral:
        return f"has corral {version('corral')}, expected {shared.corral}"
    if shared.nonce is not None:
        path, expected = shared.nonce
        try:
            found = path.read_bytes()
            with path.open("r+b"):
                pass
        except OSError as error:
            return f"cannot write the output directory {path.parent}: {error}"
        if found != expected:
            return f"sees another directory than the compile does at {path.parent}"
    source, digest = shared.sample
    try:
        values = shared.run_job.read(source)
    except Exception as error:
        return f"cannot read the checkpoint: {error}"
    if digest_of(values) != digest:
        return f"reads other weights for {source.tensor} than the compile does"
    return None


def digest_of(piece: NDArray[Any] | Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of the bytes of what was read: an array, or several by name."""
    arrays = piece.values() if isinstance(piece, Mapping) else (piece,)
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()
