"""What this machine is and has, as data: packages against what corral asks for, CPU features, memory, disk."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from corral.kernels import find_library
from corral.runtime.requirements import ALTERNATIVES, release
from corral.spec.errors import EnvironmentProblem
from corral.spec.machine import usable_cores
from corral.spec.target import TARGETS, Target

# What the kernels behind a bundle can use: (how Linux calls it on x86 and Arm, what it is for).
CPU_FEATURES = {
    "avx2": "vector kernels on x86: the least that is fast",
    "avx512f": "wider vectors",
    "avx_vnni": "int8 dot products on 256-bit vectors",
    "avx512_vnni": "int8 dot products on 512-bit vectors",
    "amx_int8": "int8 matrix tiles",
    "asimddp": "int8 dot products on Arm",
    "i8mm": "int8 matrix products on Arm",
}
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+?)\s*>=\s*(?P<least>[\w.]+)(?:.*extra\s*==\s*['\"](?P<extra>\w+)['\"])?")


@dataclass(frozen=True, kw_only=True)
class Package:
    """One package that corral asks for. `needed_by` is "corral" or the extra that asks."""

    name: str
    installed: str | None
    least: str
    needed_by: str

    @property
    def ok(self) -> bool:
        return self.installed is not None and release(self.installed) >= release(self.least)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A snapshot. Memory is what this process may use: a container's limit counts."""

    python: str
    system: str
    cpu: str
    cpu_features: tuple[str, ...]
    cores: int
    memory_bytes: int | None
    memory_free_bytes: int | None
    disk_free_bytes: int
    packages: tuple[Package, ...]
    conflicts: tuple[tuple[str, ...], ...]  # distributions that overwrite each other
    kernels: str | None = None  # the instruction set that corral's own CPU kernels use; None where they do not load
    kernels_problem: str | None = None  # why not, and the remedy
    gpu: str = ""  # its name, where CUDA can use one
    gpu_capability: str = ""  # "8.9"
    gpu_problem: str = ""  # why none can be used

    def has(self, needed_by: str) -> bool:
        """Whether all packages that `needed_by` ("corral", "compile") asks for are there and new enough."""
        return all(package.ok for package in self.packages if package.needed_by == needed_by)

    def lacks(self, target: Target) -> tuple[str, ...]:
        """What keeps bundles for a target from running here, in a few words each; nothing where they run."""
        seen = {package.name: package.installed for package in self.packages}
        versions = {name: seen.get(name, _version(name)) for name, _ in target.requires}
        enough = {name: (found := versions[name]) and release(found) >= release(v) for name, v in target.requires}
        lacking = [f"{name} {least} or newer" for name, least in target.requires if not enough[name]]
        if target.engine and self.gpu_capability not in target.capabilities:
            lacking.append(f"a GPU of compute capability {', '.join(target.capabilities)}")
        elif target.provider == "cuda" and not self.gpu:
            lacking.append("an NVIDIA GPU")
        if not self.has("corral") or self.conflicts:
            lacking.append("the packages of corral itself")
        return tuple(lacking)

    def can_run(self, target: Target) -> bool:
        return not self.lacks(target)

    @property
    def can_compile(self) -> bool:
        return self.has("corral") and self.has("compile") and not self.conflicts


def look_around(root: Path = Path("/"), here: Path = Path()) -> Machine:
    """Take the snapshot; `root` is where /proc and /sys lie, `here` whose disk counts."""
    info = _read(root / "proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", info, re.M)
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.M)
    memory = {
        key: int(value) * 1024 for key, value in re.findall(r"^(\w+):\s*(\d+) kB", _read(root / "proc/meminfo"), re.M)
    }
    limit = _read(root / "sys/fs/cgroup/memory.max").strip()
    limits = [int(limit)] if limit.isdigit() else []
    found = set(flags[1].split()) if flags else set()
    kernels, kernels_problem = _kernels()
    gpu, capability, problem = _gpu()
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpu=model[1] if model else platform.processor() or platform.machine(),
        cpu_features=tuple(feature for feature in CPU_FEATURES if feature in found),
        cores=usable_cores(root / "sys"),
        memory_bytes=min([memory["MemTotal"], *limits]) if "MemTotal" in memory else None,
        memory_free_bytes=min([memory["MemAvailable"], *limits]) if "MemAvailable" in memory else None,
        disk_free_bytes=shutil.disk_usage(here).free,
        packages=_packages(),
        conflicts=_conflicts({name for name in _installed() if name}),
        kernels=kernels,
        kernels_problem=kernels_problem,
        gpu=gpu,
        gpu_capability=capability,
        gpu_problem=problem,
    )


def compile_targets(machine: Machine) -> dict[str, Mapping[str, bool]]:
    """Target -> whether it can be compiled here, its engines (if it has any) built here, and its bundles run here."""
    return {
        name: {
            "compile": machine.can_compile,
            "build": machine.can_compile and t.engine is not None and _can_build(t.engine),
            "run": machine.can_run(t),
        }
        for name, t in TARGETS.items()
    }


def _can_build(engine: str) -> bool:
    from corral.graphs.engine.tensorrt_module import check_installed
    from corral.spec.errors import EnvironmentProblem

    try:
        return check_installed(engine).named_capabilities  # the other module needs the GPU that it builds for
    except EnvironmentProblem:
        return False


def _gpu() -> tuple[str, str, str]:
    """Name and compute capability of the GPU that engines would run on, or why there is none."""
    from corral.runtime.gpu.cuda_device import CudaDevice
    from corral.spec.errors import CorralError

    try:
        device = CudaDevice()
    except CorralError as error:
        return "", "", str(error)
    return device.name, device.capability, ""


def _packages() -> tuple[Package, ...]:
    """What corral's own metadata asks for: the minimums stand in pyproject.toml alone."""
    try:
        lines = metadata.requires("corral") or []
    except metadata.PackageNotFoundError:
        lines = []
    packages = []
    for line in lines:
        match = REQUIREMENT.match(line)
        if match and match["extra"] in (None, "compile", "ray"):
            packages.append(
                Package(
                    name=match["name"],
                    installed=_version(match["name"]),
                    least=match["least"],
                    needed_by=match["extra"] or "corral",
                )
            )
    return tuple(packages)


def _kernels() -> tuple[str | None, str | None]:
    try:
        return find_library().instruction_set, None
    except EnvironmentProblem as problem:
        return None, str(problem)


def _version(name: str) -> str | None:
    names = ALTERNATIVES.get(name, (name,))
    for candidate in names:
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return None


def _installed() -> set[str]:
    return {distribution.name.lower() for distribution in metadata.distributions() if distribution.name}


def _conflicts(installed: set[str]) -> tuple[tuple[str, ...], ...]:
    """Distributions installed side by side that provide the same module."""
    both = (tuple(name for name in names if name in installed) for names in ALTERNATIVES.values())
    return tuple(names for names in both if len(names) > 1)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
