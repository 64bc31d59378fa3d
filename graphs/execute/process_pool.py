"""Jobs in several processes: only jobs go out and digests come back; workers read and write the weights themselves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from corral.graphs.execute.executors import AHEAD, Finished, RunJob
from corral.graphs.execute.job import Job
from corral.spec.errors import EnvironmentProblem

STOP_SECONDS = 5.0


@dataclass(frozen=True)
class ProcessPool:
    """`workers` processes of one thread each, started for a run and gone with it, however it ends."""

    workers: int

    def __str__(self) -> str:
        return "1 process" if self.workers == 1 else f"{self.workers} processes"

    def run(self, run_job: RunJob, jobs: Iterable[tuple[int, Job]]) -> Generator[Finished, None, None]:
        waiting = iter(jobs)
        workers: list[_Worker] = []
        try:
            for _ in range(self.workers):
                workers.append(_Worker())
            for worker in workers:
                worker.send(run_job)
            for worker in workers * AHEAD:
                worker.take(waiting)
            while busy := {worker.connection: worker for worker in workers if worker.jobs}:
                for connection in wait(list(busy)):
                    worker = busy[connection]  # type: ignore[index]  # wait gives back what it was given
                    finished = worker.receive()
                    worker.take(waiting)
                    yield finished
        finally:
            for worker in workers:
                worker.stop()


class _Worker:
    """One process, the socket to it, and how many jobs it has."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.connection = Connection(ours.detach())
            self.jobs = 0
            # -P: the working directory's files do not count as modules. One thread each: workers are the parallelism.
            # A process group of its own: Ctrl-C stops the compile, and the compile its workers.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "corral.graphs.execute.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )

    def send(self, message: RunJob | tuple[int, Job]) -> None:
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            if self.connection.poll():  # it said why
                self.receive()
            raise self._death() from None

    def take(self, waiting: Iterator[tuple[int, Job]]) -> None:
        """Give it the next job, if there is one."""
        job = next(waiting, None)
        if job is not None:
            self.send(job)
            self.jobs += 1

    def receive(self) -> Finished:
        """What it finished. Raises the error that it met."""
        try:
            answer: Finished | BaseException = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if isinstance(answer, BaseException):
            raise answer
        self.jobs -= 1
        return answer

    def stop(self) -> None:
        """End it at once: what it has not reported does not count."""
        self.connection.close()
        self.process.kill()
        self.process.wait()

    def _death(self) -> EnvironmentProblem:
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            code = 0
        if code == -signal.SIGKILL:
            return EnvironmentProblem(
                "a worker process was killed, most likely because memory ran out. Run the same command again with a "
                "smaller --jobs."
            )
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return EnvironmentProblem(
            f"a worker process ended unexpectedly, {how}. Run the same command again. "
            "With --jobs 1 everything runs in one process."
        )
