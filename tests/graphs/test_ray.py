"""A compile on a real Ray cluster, three processes' worth of nodes on this machine: same bytes, whatever is killed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from corral.graphs.compiler import lower
from corral.graphs.execute.execution import Execution
from corral.graphs.execute.executors import Executor, Finished, RunJob, Serial
from corral.graphs.execute.job import Job, plan_jobs
from corral.graphs.execute.ray_cluster import RayCluster, check_ray, connected
from corral.graphs.execute.ray_worker import Shared, complain, digest_of
from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.rehearsal import rehearse_plan
from corral.graphs.write_bundle import write_bundle
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.open import open_checkpoint
from corral.spec.bundle import open_bundle
from corral.spec.errors import EnvironmentProblem, InputError
from corral.spec.recipe import Recipe
from corral.spec.unfinished import read_journal
from corral.spec.weight_plan import Source

# Not importorskip: ray reads how it authenticates when it is imported.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed")

INT4 = Recipe(target="cpu", weights="int4", group_size=32)
ELEMENTS = 1500  # a job's: some 400 jobs for the tiny model
PATIENCE = 120.0  # seconds that a node may take on a busy machine


@dataclass
class Node:
    """A node's processes, which are one process group."""

    process: subprocess.Popen[bytes]
    name: str

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # `ray start` may have ended before those it started
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Cluster:
    """A head that runs no jobs, and nodes of one CPU."""

    directory: Path
    address: str
    environment: dict[str, str]
    head: Node | None = None
    workers: list[Node] = field(default_factory=list)

    def start(self, *options: str) -> Node:
        command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        name = secrets.token_hex(4)
        # Nodes that start at the same time in the same directory fall over each other's sockets.
        own = tempfile.mkdtemp(prefix="", dir=self.directory)
        process = subprocess.Popen(
            [*command, f"--node-name={name}", "--object-store-memory=80000000", f"--temp-dir={own}", *options],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return Node(process, name)

    def with_two_workers(self) -> Cluster:
        """Start what is missing, and wait until the head knows these nodes and no others."""
        for node in self.workers:
            if node.process.poll() is not None:
                node.kill()
        self.workers = [node for node in self.workers if node.process.poll() is None]
        while len(self.workers) < 2:
            # Another address than the head's: Ray would connect this process to any node that has its own, and end it
            # when that node is killed.
            options = (
                f"--address={self.address}",
                "--node-ip-address=127.0.0.2",
                "--num-cpus=1",
                "--memory=4000000000",
            )
            self.workers.append(self.start(*options))
        names = {node.name for node in self.workers}
        with connected(self.address) as ray:
            until(
                lambda: (
                    {node["NodeName"] for node in ray.nodes() if node["Alive"] and "CPU" in node["Resources"]} == names
                )
            )
        return self

    def kill(self) -> None:
        for node in filter(None, (*self.workers, self.head)):
            node.kill()


def until(met: Callable[[], bool]) -> None:
    """Wait for a condition that another process brings about."""
    deadline = time.monotonic() + PATIENCE
    while not met():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def answers(address: str) -> bool:
    try:
        check_ray(address)
    except EnvironmentProblem:
        return False
    return True


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    """With token authentication; what it asks for stands in this process's environment, too, before ray is imported."""
    with (
        pytest.MonkeyPatch.context() as patch,
        # Not pytest's: Ray puts sockets there, whose paths may have 107 letters.
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory,
    ):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Nodes that are gone are noticed after 5 seconds and not 15.
        cluster = Cluster(Path(directory), f"127.0.0.1:{port}", {**os.environ, "RAY_health_check_period_ms": "1000"})
        try:
            cluster.head = cluster.start("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false")
            until(lambda: answers(cluster.address))
            yield cluster
        finally:
            cluster.kill()


@pytest.fixture
def cluster(head: Cluster) -> Cluster:
    return head.with_two_workers()


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Callable[[str], Path]) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint("guard"))


@pytest.fixture(scope="module")
def work(source: Checkpoint) -> ModelAndPlan:
    return lower(source, INT4)


@pytest.fixture(scope="module")
def whole(source: Checkpoint, work: ModelAndPlan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The SHA-256s of a compile without Ray."""
    return write(work, source, tmp_path_factory.mktemp("whole"), Serial())


def write(work: ModelAndPlan, source: Checkpoint, out: Path, executor: Executor) -> dict[str, str]:
    how = Execution(job_elements=ELEMENTS, sync_bytes=1 << 14, executor=executor)
    write_bundle(work, source, out, how=how)
    assert not list(out.glob("*.partial*"))
    return {record.path: record.sha256 for record in open_bundle(out).manifest.files}


@dataclass
class Reading:
    """An executor whose jobs read through `read`."""

    executor: Executor
    read: Callable[[Source], NDArray[np.float32]]

    def run(self, run_job: RunJob, jobs: Iterable[tuple[int, Job]]) -> Generator[Finished, None, None]:
        return self.executor.run(dataclasses.replace(run_job, read=self.read), jobs)


def test_a_node_killed_in_the_middle_of_a_job_costs_nothing_but_time(
    cluster: Cluster, work: ModelAndPlan, source: Checkpoint, whole: dict[str, str], tmp_path: Path
) -> None:
    jobs = plan_jobs(work.plan, work.plan.placements(), ELEMENTS)
    chosen, victim, patience = jobs[len(jobs) // 2].source, tmp_path / "victim", PATIENCE

    def read(piece: Source) -> NDArray[np.float32]:  # local, so that it pickles whole
        if piece == chosen and not victim.exists():  # only the second worker to come here gets on
            victim.write_text(f"{os.getppid()} ")
            time.sleep(patience)
        return source.read(piece)

    def kill() -> None:
        until(lambda: victim.exists() and victim.read_text().endswith(" "))
        raylet = int(victim.read_text())
        (node,) = (node for node in cluster.workers if node.process.pid == os.getpgid(raylet))
        node.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    assert write(work, source, tmp_path / "out", Reading(RayCluster(cluster.address), read)) == whole
    killer.join()
    assert sum(node.process.poll() is None for node in cluster.workers) == 1


def test_rehearsed_on_the_cluster(cluster: Cluster, work: ModelAndPlan, source: Checkpoint) -> None:
    places = work.plan.placements()
    here = rehearse_plan(work.plan, places, source.read, Execution(job_elements=100_000, executor=Serial()))
    there = rehearse_plan(work.plan, places, source.read, Execution(job_elements=100_000, ray=cluster.address, jobs=1))
    assert there.shards == here.shards


def test_workers_see_what_a_calibration_learned(cluster: Cluster, source: Checkpoint, tmp_path: Path) -> None:
    gptq = lower(source, dataclasses.replace(INT4, method="gptq", calibration_tokens=1024))
    assert write(gptq, source, tmp_path / "there", RayCluster(cluster.address)) == write(
        gptq, source, tmp_path / "here", Serial()
    )


def test_a_damaged_weight_is_raised_as_itself_and_nothing_is_left(
    cluster: Cluster, work: ModelAndPlan, source: Checkpoint, tmp_path: Path
) -> None:
    shutil.copytree(source.directory, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.3.self_attn.q_proj.weight"][5, 7] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    damaged = open_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(InputError, match=r"q_proj\.weight holds nan"):
        write(work, damaged, tmp_path / "out", RayCluster(cluster.address))
    assert not (tmp_path / "out").exists()


def test_a_node_that_does_not_see_the_output_directory_is_named(
    cluster: Cluster, work: ModelAndPlan, source: Checkpoint, tmp_path: Path
) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    try:  # a path that leads somewhere in this process only
        with pytest.raises(EnvironmentProblem, match=rf"node {socket.gethostname()} .* cannot write the output dir"):
            write(work, source, Path(f"/proc/self/fd/{directory}"), RayCluster(cluster.address))
    finally:
        os.close(directory)
    assert not any(tmp_path.iterdir())


def test_with_all_nodes_gone_it_stops_and_goes_on_elsewhere(
    cluster: Cluster,
    work: ModelAndPlan,
    source: Checkpoint,
    whole: dict[str, str],
    tmp_path: Path,
    watched: Callable[..., Any],
) -> None:
    def kill() -> None:
        for node in cluster.workers:
            node.kill()

    with pytest.raises(EnvironmentProblem, match=r"none of the 1 nodes that the Ray cluster at .* can run a job"):
        write(work, source, tmp_path, watched(RayCluster(cluster.address), {30: kill}))
    journal = read_journal(tmp_path)
    assert journal is not None
    assert len(journal.done) >= 30
    rest = watched(Serial())
    assert write(work, source, tmp_path, rest) == whole
    assert not set(rest.order) & set(journal.done)


def test_a_wrong_token_is_said_at_once(head: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with pytest.raises(EnvironmentProblem, match="asks for a token"):
        Execution(ray=head.address)


def test_nobody_there_and_somebody_else_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral.graphs.execute.ray_cluster.ANSWER_SECONDS", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(EnvironmentProblem, match=r"what answers at .* is no Ray cluster"):
            check_ray(address)
    with pytest.raises(EnvironmentProblem, match="no Ray cluster answers at"):
        check_ray(address)


@pytest.mark.parametrize("address", ["", "auto", "head", "ray://head:10001", "head:", ":6379", "head:65536", "head:x"])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(InputError, match=r"--ray is .*, expected HOST:PORT"):
        Execution(ray=address)


def test_without_the_package_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r'pip install "corral\[compile,ray\]"'):
        Execution(ray="head:6379")


def test_a_worker_complains_of_another_corral_directory_or_checkpoint(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "nonce").write_bytes(b"one")
    piece = Source("model.norm.weight", rows=(0, 64))
    good = Shared(
        run_job=RunJob(source.read, None),
        corral=version("corral"),
        here=str(tmp_path),
        nonce=(tmp_path / "nonce", b"one"),
        sample=(piece, digest_of(source.read(piece))),
    )
    assert complain(good) is None
    for change, words in (
        ({"corral": "0.0.1"}, "expected 0.0.1"),
        ({"nonce": (tmp_path / "nonce", b"two")}, "sees another directory"),
        ({"nonce": (tmp_path / "none", b"one")}, "cannot write the output directory"),
        ({"sample": (piece, "0" * 64)}, r"reads other weights for model.norm.weight"),
        ({"sample": (Source("nowhere", rows=(0, 1)), "")}, "cannot read the checkpoint"),
    ):
        assert words in str(complain(dataclasses.replace(good, **change)))


def test_codes_and_scales_have_the_digest_of_their_bytes() -> None:
    """Of what an already quantized checkpoint is read as; another process must come to the same."""
    codes, scales = np.arange(6, dtype=np.uint8), np.ones(2, np.float32)
    digest = digest_of({"codes": codes, "scales": scales})
    assert digest == hashlib.sha256(codes.tobytes() + scales.tobytes()).hexdigest()
    assert digest != digest_of({"codes": codes, "scales": 2 * scales})
