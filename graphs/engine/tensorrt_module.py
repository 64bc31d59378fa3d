"""The module that builds, `tensorrt` or `tensorrt_rtx`, checked and imported; `spec.tensorrt_flavors` has their differences."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

from corral.spec.errors import EnvironmentProblem
from corral.spec.tensorrt_flavors import FLAVORS, Flavor


@dataclass(frozen=True)
class TensorRT:
    """An imported module and its row of the table."""

    module: ModuleType
    flavor: Flavor

    @property
    def name(self) -> str:
        """Module and version, as engines remember them: another version does not open them."""
        return f"{self.flavor.module} {self.module.__version__}"


def check_installed(name: str) -> Flavor:
    """The flavor called `name`. Raises EnvironmentProblem unless its package is there in a version that fits."""
    flavor = FLAVORS[name]
    remedy = f"Run `{flavor.pip()}`."
    found = installed_version(flavor)
    if found is None:
        raise EnvironmentProblem(f"the package {flavor.distribution} is not installed; engines need it. {remedy}")
    if _release(found) != _release(flavor.version):
        raise EnvironmentProblem(
            f"{flavor.distribution} is {found}; this corral was written against {flavor.version}, and other versions "
            f"accept other graphs. {remedy}"
        )
    return flavor


def load_tensorrt(name: str) -> TensorRT:
    """Import a module. Raises EnvironmentProblem where it is missing, of another version, or does not load."""
    flavor = check_installed(name)
    try:
        module = importlib.import_module(flavor.module)
    except (ImportError, OSError) as error:
        raise EnvironmentProblem(
            f"{flavor.distribution} is installed but does not load: {error}. Reinstall it: "
            f'`pip install --force-reinstall "{flavor.distribution}=={flavor.version}"`.'
        ) from None
    return TensorRT(module, flavor)


def installed_version(flavor: Flavor) -> str | None:
    """By the package's metadata, without importing it."""
    try:
        return metadata.version(flavor.distribution)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> list[str]:
    return version.split(".")[:2]
