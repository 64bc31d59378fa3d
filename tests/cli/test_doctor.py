from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.cli import machine as machine_module
from corral.cli.machine import Machine, Package, compile_targets, look_around
from corral.spec.target import TARGETS

Corral = Callable[..., Any]

GOOD = Machine(
    python="3.11.7",
    system="Linux x86_64",
    cpu="Some CPU",
    cpu_features=("avx2",),
    cores=2,
    memory_bytes=8 << 30,
    memory_free_bytes=4 << 30,
    disk_free_bytes=100 << 30,
    packages=(
        Package(name="onnxruntime", installed="1.31.1", least="1.31", needed_by="corral"),
        Package(name="torch", installed="2.13.0+cpu", least="2.13", needed_by="compile"),
    ),
    conflicts=(),
)


def with_package(name: str, installed: str | None) -> Machine:
    packages = (dataclasses.replace(p, installed=installed) if p.name == name else p for p in GOOD.packages)
    return dataclasses.replace(GOOD, packages=tuple(packages))


def test_this_machine_can_do_everything(corral: Corral) -> None:
    data = json.loads(corral("doctor", "--json").stdout)
    assert data["problems"] == []
    assert all(can["compile"] for can in data["targets"].values())
    fit = {name for name, t in TARGETS.items() if not t.engine or data["gpu_capability"] in t.capabilities}
    assert {name for name, can in data["targets"].items() if can["run"]} <= fit
    assert {"portable", "cpu"} <= {name for name, can in data["targets"].items() if can["run"]}
    assert bool(data["gpu"]) != bool(data["gpu_problem"])
    assert [name for name, can in data["targets"].items() if can["build"]] == ["tensorrt-rtx"]
    assert {"numpy", "onnxruntime", "torch"} <= {package["name"] for package in data["packages"]}
    assert data["memory_bytes"] > data["memory_free_bytes"] > 0
    assert "onnxruntime" in corral("doctor").stdout


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        (with_package("onnxruntime", None), "onnxruntime is missing, expected 1.31 or newer"),
        (
            with_package("onnxruntime", "1.9.0"),
            'onnxruntime is 1.9.0, expected 1.31 or newer: run `pip install -U "onn',
        ),
        (
            dataclasses.replace(GOOD, conflicts=(("onnxruntime", "onnxruntime-gpu"),)),
            "run `pip uninstall onnxruntime onnxruntime-gpu`, then `pip install onnxruntime`",
        ),
    ],
)
def test_what_is_broken_ends_with_exit_code_3_and_a_remedy(
    corral: Corral, monkeypatch: pytest.MonkeyPatch, machine: Machine, says: str
) -> None:
    monkeypatch.setattr(machine_module, "look_around", lambda: machine)
    result = corral("doctor", code=3)
    assert says in result.stderr
    assert "Some CPU" in result.stdout  # the facts are shown all the same
    assert not any(can["run"] for can in compile_targets(machine).values())


def test_without_torch_bundles_run_and_nothing_is_broken(corral: Corral, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = with_package("torch", None)
    monkeypatch.setattr(machine_module, "look_around", lambda: machine)
    assert 'pip install "corral[compile]"' in corral("doctor").stdout
    can = compile_targets(machine)
    assert not any(here["compile"] or here["build"] for here in can.values())
    assert all(
        here["run"] for name, here in can.items() if TARGETS[name].provider == "cpu" and not TARGETS[name].engine
    )


def test_engines_run_where_the_gpu_is_one_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "_version", {"tensorrt-rtx-cu13": "1.7.1.116", "tensorrt": None}.get)
    ada = dataclasses.replace(GOOD, gpu="RTX 4090", gpu_capability="8.9")
    hopper = dataclasses.replace(GOOD, gpu="H200", gpu_capability="9.0")
    assert [compile_targets(machine)["tensorrt-rtx"]["run"] for machine in (ada, hopper, GOOD)] == [True, False, False]
    assert not compile_targets(hopper)["tensorrt"]["run"]  # its package is missing


def test_doctor_says_what_a_target_lacks(corral: Corral, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"cuda-bindings": "13.0.3", "onnxruntime-gpu": None}
    monkeypatch.setattr(machine_module, "_version", versions.get)
    assert GOOD.lacks(TARGETS["cpu"]) == ()
    assert GOOD.lacks(TARGETS["cuda"]) == ("onnxruntime-gpu 1.31 or newer", "an NVIDIA GPU")
    monkeypatch.setattr(machine_module, "look_around", lambda: GOOD)
    assert "cuda needs here: onnxruntime-gpu 1.31 or newer; an NVIDIA GPU" in corral("doctor").stdout
    versions["onnxruntime-gpu"] = "1.31.1"
    assert dataclasses.replace(GOOD, gpu="T4", gpu_capability="7.5").can_run(TARGETS["cuda"])


def test_facts_come_from_proc_and_a_containers_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 avx512f avx512_vnni\n\nprocessor\t: 1\n"
    )
    (tmp_path / "proc/meminfo").write_text("MemTotal:       8000000 kB\nMemAvailable:   3000000 kB\n")
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("4096000000\n")
    found = look_around(tmp_path, tmp_path)
    assert found.cpu == "A CPU"
    assert found.cpu_features == ("avx2", "avx512f", "avx512_vnni")
    assert (found.memory_bytes, found.memory_free_bytes) == (4_096_000_000, 3_072_000_000)


def test_a_machine_without_proc_is_no_error(tmp_path: Path) -> None:
    found = look_around(tmp_path, tmp_path)
    assert found.memory_bytes is None
    assert found.cpu_features == ()
    assert found.cores >= 1


def test_packages_are_those_of_the_projects_metadata() -> None:
    found = look_around().packages
    assert {p.needed_by for p in found} == {"corral", "compile", "ray"}
    assert next(p.least for p in found if p.name == "numpy") == "2.0"


@pytest.mark.parametrize(
    ("installed", "conflicts"),
    [({"onnxruntime"}, ()), ({"onnxruntime", "onnxruntime-gpu", "numpy"}, (("onnxruntime", "onnxruntime-gpu"),))],
)
def test_distributions_of_one_module_conflict(installed: set[str], conflicts: tuple[Any, ...]) -> None:
    assert machine_module._conflicts(installed) == conflicts
