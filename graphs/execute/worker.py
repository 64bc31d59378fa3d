"""A worker process: `python -m corral.graphs.execute.worker FD` runs the jobs that come through a socket, until it closes.

A plain child, and not one of `multiprocessing`: that would run the user's own script again in every worker.
"""

from __future__ import annotations

import ctypes
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection

PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def main(fd: int) -> None:
    """Receive a RunJob, then (index, Job) pairs; send (index, digests) for each, or the exception, and end."""
    if sys.platform == "linux":  # a killed compile leaves no worker behind, not even for the rest of its job
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    keep_freed_memory()
    with Connection(fd) as connection:
        try:
            run_job = connection.recv()
            import torch

            torch.set_num_threads(1)
            while True:
                index, job = connection.recv()
                connection.send((index, run_job(job)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the compile is over
        except BaseException as error:
            connection.send(sendable(error))


def keep_freed_memory() -> None:
    """Let the allocator keep what one job frees for the next: fresh pages cost as much time as quantizing them."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc; others do well enough without
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def sendable(error: BaseException) -> BaseException:
    """The error itself with this process's traceback as a note; where it does not pickle, its words."""
    words = traceback.format_exc()
    error.add_note(words)
    try:
        pickle.dumps(error)
    except Exception:
        return RuntimeError(words)
    return error


if __name__ == "__main__":
    main(int(sys.argv[1]))
