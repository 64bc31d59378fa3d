"""benchmarks/kernels_moe.py, as far as it runs without a GPU: what it checks with, on the CPU through the shim."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from corral.graphs.engine.kernels.launch import FORMATS, TILINGS, Launch, MoeShape, buffers
from corral.graphs.execute.steps import STEPS
from corral.model.checkpoint.checkpoint import alternating

from .conftest import RunOnCpu

SCRIPT = Path(__file__).parents[4] / "benchmarks/kernels_moe.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernels_moe", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_its_small_cases_are_right_on_the_cpu(benchmark: ModuleType, run_on_cpu: RunOnCpu) -> None:
    def run(launch: Launch, given: dict[str, Tensor]) -> None:
        run_on_cpu(launch, {name: tensor.numpy() for name, tensor in given.items()})

    cases = list(benchmark.check_small(run, "cpu", (5,), ("random",)))
    assert len(cases) == len(benchmark.SMALL_CASES) * len(TILINGS)
    assert [case for case in cases if not (case["right"] and case["repeatable"])] == []


def test_a_wrong_kernel_is_found(benchmark: ModuleType, run_on_cpu: RunOnCpu) -> None:
    def run(launch: Launch, given: dict[str, Tensor]) -> None:
        run_on_cpu(launch, {name: tensor.numpy() for name, tensor in given.items()})
        given["y"][0, 3] += 0.5

    shape = MoeShape(hidden=64, width=64, experts=8, top_k=1, weights="fp16")
    weights = benchmark.random_weights(shape, "cpu", keep=True)
    assert not benchmark.check(run, weights, 3, TILINGS[0], "even", "cpu")["right"]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_it_packs_as_a_plan_does(bits: int, benchmark: ModuleType) -> None:
    rng = np.random.default_rng(bits)
    codes: Any = rng.integers(0, 16, (64, 128)).astype(np.float16 if bits == 16 else np.uint8)
    mine = benchmark.pack(benchmark.interleave(torch.from_numpy(codes), True), bits).numpy()
    gate, up = np.split(codes, 2)
    plans = STEPS["pack_fragments"](alternating(gate, up, 8), bits=bits)
    np.testing.assert_array_equal(mine, plans)
    scales: Any = rng.random((64, 3), np.float32)
    plans = STEPS["fragment_scales"](scales, dtype="float32")
    np.testing.assert_array_equal(benchmark.pack_scales(torch.from_numpy(scales)).numpy(), plans)


@pytest.mark.parametrize("weights", FORMATS)
def test_its_weights_have_the_shapes_that_the_kernels_expect(weights: str, benchmark: ModuleType) -> None:
    shape = MoeShape(hidden=64, width=128, experts=8, top_k=1, weights=weights, group_size=64 * (weights == "int4"))
    made = benchmark.random_weights(shape, "cpu", keep=False).stored | benchmark.tokens_for(shape, 5, "cpu")
    expected = {name: (dtype, extent) for name, (dtype, extent) in buffers(shape, 5).items()}
    assert {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in made.items()} == expected


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 3
    assert "no GPU" in done.stderr
    assert "Traceback" not in done.stderr
