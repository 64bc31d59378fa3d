"""Jobs on a Ray cluster, whose nodes share a file system: each worker reads the checkpoint and writes into the shards.

Only jobs go out and digests come back. A job whose worker or node dies is run again elsewhere: it writes the same bytes
to the same place.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from corral.graphs.execute.executors import AHEAD, Finished, RunJob
from corral.graphs.execute.job import Job
from corral.graphs.execute.ray_worker import Shared, digest_of, run
from corral.graphs.execute.shards import PARTIAL
from corral.spec.errors import EnvironmentProblem, InputError
from corral.spec.unfinished import JOURNAL_NAME
from corral.spec.weight_plan import PROCESS_BYTES

RETRIES = 3  # of a job whose worker or node died
LOOK_SECONDS = 5.0  # between two looks at the cluster's nodes
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 20.0
STOP_SECONDS = 10.0
# Read when ray is imported. A compile neither reports to Ray's makers nor uploads its working directory.
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


@dataclass(frozen=True)
class RayCluster:
    """The workers of a running cluster; `address` is its head's HOST:PORT. `most`: jobs in flight; None: as they fit."""

    address: str
    most: int | None = None

    def __str__(self) -> str:
        return f"Ray at {self.address}"

    def run(self, run_job: RunJob, jobs: Iterable[tuple[int, Job]]) -> Generator[Finished, None, None]:
        """Raises EnvironmentProblem where the cluster cannot be reached, a node sees other files, or all nodes are lost."""
        waiting = list(jobs)
        if not waiting:
            return
        memory = PROCESS_BYTES + max(job.peak_bytes for _, job in waiting)
        check_ray(self.address)
        with connected(self.address) as ray, _shared(run_job, waiting) as shared:
            # Retried by Ray is only what died with its worker or node: errors come back as values.
            task = ray.remote(run).options(num_cpus=1, memory=memory, max_retries=RETRIES, scheduling_strategy="SPREAD")
            reference = ray.put(shared)
            left = iter(waiting)
            running: dict[Any, int] = {}  # reference of a result -> its job
            limit, looked = 0, float("-inf")
            try:
                while True:
                    if time.monotonic() - looked >= LOOK_SECONDS:
                        limit, looked = self._limit(ray.nodes(), memory), time.monotonic()
                    for index, job in itertools.islice(left, max(0, limit - len(running))):
                        running[task.remote([reference], job)] = index
                    if not running:
                        return
                    for finished in ray.wait(list(running), timeout=LOOK_SECONDS)[0]:
                        digests = _result(ray, finished)
                        yield running.pop(finished), digests
            finally:
                # Nobody writes any more when this returns. Not cancelled: Ray ends this process when it cancels a task that
                # is just done (2.60, "tried to complete task that was not pending").
                if running:
                    ray.wait(list(running), num_returns=len(running), timeout=STOP_SECONDS)

    def _limit(self, nodes: Sequence[dict[str, Any]], memory: int) -> int:
        """Jobs to have in flight. Raises EnvironmentProblem where no node can run one."""
        alive = [node["Resources"] for node in nodes if node["Alive"]]
        workers = sum(int(min(node.get("CPU", 0), node.get("memory", 0) // memory)) for node in alive)
        if not workers:
            raise EnvironmentProblem(
                f"none of the {len(alive)} nodes that the Ray cluster at {self.address} has now can run a job, which needs "
                f"a CPU and {memory / 1e9:.1f} GB of memory. Add nodes with `ray start --address={self.address}` and run "
                "the same command again."
            )
        return self.most or AHEAD * workers


def check_ray(address: str) -> None:
    """Raise InputError unless `address` is HOST:PORT, EnvironmentProblem unless a cluster there lets this process in."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InputError(
            f'--ray is "{address}", expected HOST:PORT of a cluster\'s head, as `ray start --head` prints it.'
        )
    if importlib.util.find_spec("ray") is None:
        raise EnvironmentProblem(
            'the Python package ray is missing, and --ray needs it. Install it with `pip install "corral[compile,ray]"`.'
        )
    start = "Start one with `ray start --head`, or correct --ray."
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise EnvironmentProblem(f"no Ray cluster answers at {address}: {error}. {start}") from error
    # In a process of its own: ray.init asks for minutes, and then ends the process.
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "health-check", "--address", address]
    environment = {**SETTINGS, **os.environ}
    try:
        asked = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, timeout=ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentProblem(f"what answers at {address} is no Ray cluster. {start}") from None
    if "AuthenticationError" in asked.stderr:
        raise EnvironmentProblem(
            f"the Ray cluster at {address} asks for a token. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the cluster's."
        )
    if asked.returncode:
        raise _refused(address, asked.stderr.strip().rpartition("\n")[2])


def _refused(address: str, words: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"the Ray cluster at {address} does not let this process in: {words} The compile must run on one of the cluster's "
        "machines, with the same versions of Python and Ray."
    )


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected; its errors become EnvironmentProblem."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        raise _refused(address, _words(error)) from error
    try:
        yield ray
    except ray.exceptions.RayError as error:
        raise EnvironmentProblem(f"the Ray cluster at {address} failed: {_words(error)}") from error
    finally:
        ray.shutdown()


@contextmanager
def _shared(run_job: RunJob, jobs: Sequence[tuple[int, Job]]) -> Iterator[Shared]:
    """What the workers are given, with a file in the output directory that tells it from any other."""
    sample = min((job for _, job in jobs), key=lambda job: job.elements).source
    nonce = None
    if run_job.shards is not None:
        # What is in another machine's memory cannot be synced from here.
        shards = dataclasses.replace(run_job.shards, durable=True)
        run_job = dataclasses.replace(run_job, shards=shards)
        nonce = shards.directory / (JOURNAL_NAME + PARTIAL), secrets.token_bytes(16)
        nonce[0].write_bytes(nonce[1])
    try:
        yield Shared(
            run_job=run_job,
            corral=version("corral"),
            here=os.getcwd(),
            nonce=nonce,
            sample=(sample, digest_of(run_job.read(sample))),
        )
    finally:
        if nonce is not None:
            nonce[0].unlink(missing_ok=True)


def _result(ray: Any, reference: Any) -> tuple[str, ...]:
    lost = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError)
    try:
        answer: tuple[str, ...] | BaseException = ray.get(reference)
    except lost as error:
        raise EnvironmentProblem(
            f"a job lost its worker {RETRIES + 1} times, most likely because the nodes have less memory than they told Ray: "
            f"{_words(error)} Run the same command again, with a smaller --jobs or `ray start --memory`."
        ) from error
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _words(error: BaseException) -> str:
    """The first line of what Ray says, which goes on for pages."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
