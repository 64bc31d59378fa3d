"""The project's CUDA kernels on the CPU: compiled with g++ through shim_cuda_cpu.h, launched from the same plain data."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from corral.graphs.engine.kernels.compile import SOURCES, cuda_headers
from corral.graphs.engine.kernels.launch import DECODE, FORMATS, Launch, product_kernel

HERE = Path(__file__).parent
Buffers = Mapping[str, NDArray[np.generic]]
RunOnCpu = Callable[..., None]


def guarded(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """A copy whose last byte is the last of a page, before one that may not be touched: reading past it ends the test."""
    page = mmap.PAGESIZE
    room = -(-max(array.nbytes, 1) // page) * page
    mapping = mmap.mmap(-1, room + page)
    forbid(np.frombuffer(mapping, np.uint8)[room:])
    inside = np.frombuffer(mapping, np.uint8, array.nbytes, room - array.nbytes).view(array.dtype)
    copy = inside.reshape(array.shape)
    copy[...] = array
    return copy


def forbid(pages: NDArray[np.generic]) -> None:
    """Make whole pages neither readable nor writable."""
    assert pages.ctypes.data % mmap.PAGESIZE == 0 and pages.nbytes % mmap.PAGESIZE == 0
    libc = ctypes.CDLL(None, use_errno=True)
    protect_none = 0
    assert libc.mprotect(ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(pages.nbytes), protect_none) == 0


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
            done = subprocess.run([*command, HERE / "on_cpu.cpp", "-o", path], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            built[macros] = ctypes.CDLL(str(path))
        return built[macros]

    def run(launch: Launch, buffers: Buffers, seed: int = 1) -> None:
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
