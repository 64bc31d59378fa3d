"""NVRTC without a GPU: every kernel compiles for every capability and uses no more of it than the table beside says."""

from __future__ import annotations

import builtins
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from corral.graphs.engine.kernels.compile import (
    ARCHITECTURES,
    Resources,
    compile_kernel,
    nvrtc_version,
    parse_resources,
)
from corral.graphs.engine.kernels.launch import DECODE, FORMATS, KERNELS, ROUTE, TILINGS, Kernel, product_kernel
from corral.spec.errors import EnvironmentProblem
from corral.spec.target import TENSORRT_CAPABILITIES

# Written by NVRTC 13.0.88: {kernel: {architecture: resources}}. To accept other numbers, look at them, then write what
# the failing test prints into the file.
TABLE: dict[str, dict[str, dict[str, int]]] = json.loads(Path(__file__).with_name("resources.json").read_text())
INT4_DECODE = product_kernel("moe_down", FORMATS["int4"], DECODE)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernels_use_what_the_table_says(kernel: Kernel) -> None:
    used = {}
    for architecture in ARCHITECTURES:
        resources = compile_kernel(kernel, architecture).resources
        assert resources
        used[architecture] = dataclasses.asdict(resources)
    recorded = TABLE.get(kernel.name, {})
    changes = [
        f"{architecture}: {name} was {recorded.get(architecture, {}).get(name)}, is {value}"
        for architecture, values in used.items()
        for name, value in values.items()
        if recorded.get(architecture, {}).get(name) != value
    ]
    assert not changes, f"{kernel.name}: {changes}; the table would be {json.dumps({kernel.name: used})}"


def test_the_table_holds_these_kernels_only() -> None:
    assert TABLE.keys() == {kernel.name for kernel in KERNELS}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_as_many_blocks_fit_on_a_multiprocessor_as_the_tiling_wants(architecture: str) -> None:
    # Limits of a multiprocessor: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
    registers, reserved = 64 << 10, 1024
    shared = {"sm_80": 164, "sm_89": 100, "sm_90a": 228, "sm_100": 228, "sm_120": 100}[architecture] << 10
    for tiling in TILINGS:
        for weights in FORMATS.values():
            used = TABLE[product_kernel("moe_gate_up", weights, tiling).name][architecture]
            per_thread = -(-used["registers"] // 8) * 8  # handed out in eights
            assert tiling.blocks * tiling.threads * per_thread <= registers
            assert tiling.blocks * (used["shared_bytes"] + reserved) <= shared
            assert used["shared_bytes"] <= 48 << 10, "more must be asked for at launch"


def test_compiling_twice_gives_equal_bytes() -> None:
    assert compile_kernel(INT4_DECODE, "sm_80") == compile_kernel(INT4_DECODE, "sm_80")


def test_machine_code_uses_tensor_cores_and_keeps_the_entry_name() -> None:
    compiled = compile_kernel(INT4_DECODE, "sm_90a")
    assert compiled.image.startswith(b"\x7fELF")
    assert compiled.entry == "moe_down"
    assert b".text.moe_down\0" in compiled.image


def test_ptx_is_of_a_version_that_every_cuda_13_driver_reads() -> None:
    compiled = compile_kernel(INT4_DECODE, "compute_80", "ptx")
    text = compiled.image.decode()
    assert re.search(r"^\.version 9\.0$", text, re.M)
    assert re.search(r"^\.target sm_80$", text, re.M)
    assert text.count("mma.sync.aligned.m16n8k16") == 2 * 4 * 4  # tiles, mma a step, steps in registers
    assert compiled.resources is None


@pytest.mark.parametrize("capability", TENSORRT_CAPABILITIES)
def test_there_is_ptx_for_every_gpu_that_target_tensorrt_builds_for(capability: str) -> None:
    architecture = f"compute_{capability.replace('.', '')}"
    assert f".target sm_{capability.replace('.', '')}".encode() in compile_kernel(ROUTE, architecture, "ptx").image


def test_an_architecture_that_is_not_known_is_refused_with_nvrtc_s_words() -> None:
    with pytest.raises(EnvironmentProblem, match=r"did not compile moe_route for sm_11 .*invalid value"):
        compile_kernel(ROUTE, "sm_11")


def test_a_source_that_does_not_compile_shows_the_log() -> None:
    broken = dataclasses.replace(INT4_DECODE, macros=(*INT4_DECODE.macros[1:], ("WEIGHT_BITS", 5)))
    with pytest.raises(
        EnvironmentProblem, match=r'(?s)static assertion failed with "weight format".*corral\[kernels\]'
    ):
        compile_kernel(broken, "sm_80")


@pytest.mark.parametrize("missing", ["cuda.bindings", "nvidia-cuda-runtime"])
def test_a_missing_package_is_named_with_its_remedy(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    real_import = builtins.__import__

    def no_import(name: str, *rest: Any, **more: Any) -> Any:
        if name == missing:
            raise ModuleNotFoundError(name=name)
        return real_import(name, *rest, **more)

    def no_files(package: str) -> Any:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(builtins, "__import__", no_import)
    if missing == "nvidia-cuda-runtime":
        monkeypatch.setattr(metadata, "files", no_files)
    with pytest.raises(EnvironmentProblem, match=r'is missing\. Install it with `pip install "corral\[kernels\]"`'):
        compile_kernel(ROUTE, "sm_80")


def test_resources_are_read_from_what_ptxas_prints() -> None:
    log = """ptxas info    : Function properties for k
    ptxas         .     24 bytes stack frame, 20 bytes spill stores, 36 bytes spill loads
    ptxas info    : Used 168 registers, used 1 barriers, 32768 bytes smem, 372 bytes cmem[0]"""
    expected = Resources(registers=168, shared_bytes=32768, stack_bytes=24, spill_store_bytes=20, spill_load_bytes=36)
    assert parse_resources(log) == expected
    with pytest.raises(EnvironmentProblem, match="no registers and stack"):
        parse_resources("nothing")


def test_the_version_is_the_one_the_table_was_written_with() -> None:
    assert nvrtc_version() == "13.0"
