"""Executors that tests watch and disturb; the demo model lowered for TensorRT; the project's CUDA kernels on the CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from corral.graphs.engine.kernels.compile import SOURCES, cuda_headers
from corral.graphs.engine.kernels.launch import DECODE, FORMATS, Launch, product_kernel
from corral.graphs.execute.executors import Executor, Finished, RunJob
from corral.graphs.execute.job import Job

DEMO = Path(__file__).parents[2] / "demo" / "demo-scout"
KERNELS = Path(__file__).parent / "engine" / "kernels"  # on_cpu.cpp and the shim it is compiled with
RunOnCpu = Callable[..., None]


@dataclass
class Watched:
    """An executor that notes the order in which jobs are finished, and calls `then[n]` when n of them are."""

    executor: Executor
    then: Mapping[int, Callable[[], object]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)

    def run(self, run_job: RunJob, jobs: Iterable[tuple[int, Job]]) -> Generator[Finished, None, None]:
        for finished in self.executor.run(run_job, jobs):
            self.order.append(finished[0])
            if len(self.order) in self.then:
                self.then[len(self.order)]()
            yield finished


@pytest.fixture
def watched() -> type[Watched]:
    """`watched(executor, {20: function})`."""
    return Watched


@pytest.fixture(scope="session")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`lowered("int4")` -> the demo model lowered for TensorRT, without engines; made once. Do not write into it.

    "fp8 int4": experts in int4, all else in FP8.
    """
    made: dict[str, Path] = {}

    def make(weights: str) -> Path:
        from corral.graphs import compile
        from corral.spec.recipe import Recipe
        from corral.spec.rule import Rule

        if weights not in made:
            made[weights] = tmp_path_factory.mktemp(weights.replace(" ", "-")) / "demo"
            all_else, _, experts = weights.partition(" ")
            rules = (Rule(matrices="*.experts.*", weights=experts),) if experts else ()
            how = Recipe(target="tensorrt-rtx", weights=all_else, group_size=64, calibration_tokens=1024, rules=rules)
            compile(DEMO, made[weights], how)
        return made[weights]

    return make


@pytest.fixture(scope="session")
def run_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> RunOnCpu:
    """`run_on_cpu(launch, buffers, seed=1)` runs one launch in place; the seed orders the threads between barriers."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the kernels for the CPU with")
    folder = tmp_path_factory.mktemp("kernels")
    built: dict[tuple[tuple[str, int], ...], ctypes.CDLL] = {}

    def library(macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
        if macros not in built:
            path = folder / f"{len(built)}.so"
            headers = cuda_headers()
            command = [
                compiler,
                "-std=c++17",
                "-O1",
                "-fPIC",
                "-shared",
                "-fno-strict-aliasing",
                "-Wno-unknown-pragmas",
            ]
            command += [f"-isystem{headers}", f"-isystem{headers / 'cccl'}", f"-I{SOURCES}"]
            command += [f"-D{macro}={value}" for macro, value in macros]
            done = subprocess.run([*command, KERNELS / "on_cpu.cpp", "-o", path], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            built[macros] = ctypes.CDLL(str(path))
        return built[macros]

    def run(launch: Launch, buffers: Mapping[str, NDArray[np.generic]], seed: int = 1) -> None:
        values = [
            ctypes.c_void_p(buffers[argument].ctypes.data) if isinstance(argument, str) else ctypes.c_int32(argument)
            for argument in launch.arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values))
        grid = (ctypes.c_uint * 3)(*launch.grid)
        # moe_route is the same in every library.
        macros = launch.kernel.macros or next(iter(built), product_kernel("", FORMATS["int4"], DECODE).macros)
        entry = getattr(library(macros), f"launch_{launch.kernel.entry}")
        entry(grid, ctypes.c_uint(launch.threads), pointers, ctypes.c_uint(seed))

    return run
