"""Whether the installed packages are new enough for a bundle, by their metadata and without importing them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata

from corral.kernels import find_library
from corral.spec.cpu_ops import LIBRARY
from corral.spec.errors import EnvironmentProblem

# Distributions that provide the same module; two of them in one environment overwrite each other's files.
ALTERNATIVES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"),
}


def check_requirements(requires: Mapping[str, str]) -> None:
    """Raise EnvironmentProblem where a package is missing, older than `requires` says, or installed twice.

    The same for corral's library of custom operators, which is no package.
    """
    for package, minimum in requires.items():
        if package == LIBRARY:
            _check_library(minimum)
            continue
        names = ALTERNATIVES.get(package, (package,))
        found = {name: version for name in names if (version := _version(name))}
        if not found:
            raise EnvironmentProblem(
                f"the package {package} is not installed; this bundle needs {package} {minimum} or newer. "
                f"Run `pip install '{package}>={minimum}'`."
            )
        if len(found) > 1:
            raise EnvironmentProblem(
                f"{' and '.join(found)} are both installed and overwrite each other. "
                "Uninstall them all, then install one."
            )
        ((name, version),) = found.items()
        if release(version) < release(minimum):
            raise EnvironmentProblem(
                f"{name} is {version}; this bundle needs {minimum} or newer. Run `pip install -U '{name}>={minimum}'`."
            )


def _check_library(version: str) -> None:
    """A library has the operators of its own version only, unlike a package."""
    library = find_library()
    if version != str(library.version):
        older = version.isdigit() and int(version) < library.version
        remedy = "Compile the checkpoint again with this version of corral." if older else "Install a newer corral."
        raise EnvironmentProblem(
            f"corral's CPU kernels ({library.path}) have version {library.version}; this bundle needs {version[:20]}. {remedy}"
        )


def release(version: str) -> tuple[int, ...]:
    """The release numbers of a version, without trailing zeros: "1.31.0rc1" -> (1, 31)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in numbers.group().split(".")] if numbers else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
