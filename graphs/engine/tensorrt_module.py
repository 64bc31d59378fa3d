"""The seam: `tensorrt` or `tensorrt_rtx`, and in one table all that differs between them.

Both modules have the same Builder, OnnxParser, profiles and engines; everything above this file is written once.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

from corral.spec.errors import EnvironmentProblem


@dataclass(frozen=True, kw_only=True)
class Flavor:
    """One of the two modules. `version` is the one corral was written against; the first two numbers must agree."""

    module: str
    distribution: str
    version: str
    named_capabilities: bool  # builds for compute capabilities that are named; otherwise for the GPU that is there
    plugins: bool  # takes kernels of others
    engine_validity: bool  # can say whether an engine runs on this device without opening it
    runtime_cache: bool  # finishes compiling kernels where the engine runs, and can keep the result
    text_schedule: bool  # an engine holds its schedule as text (undocumented; read only for this version)
    executed: bool  # whether corral's own tests run this module


FLAVORS = {
    flavor.module: flavor
    for flavor in (
        Flavor(
            module="tensorrt_rtx",
            distribution="tensorrt-rtx-cu13",
            version="1.7.1.116",
            named_capabilities=True,
            plugins=False,
            engine_validity=True,
            runtime_cache=True,
            text_schedule=True,
            executed=True,
        ),
        Flavor(
            module="tensorrt",
            distribution="tensorrt",
            version="11.0",
            named_capabilities=False,
            plugins=True,
            engine_validity=False,
            runtime_cache=False,
            text_schedule=False,
            executed=False,
        ),
    )
}


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
    remedy = f'Run `pip install "{flavor.distribution}=={flavor.version}"`.'
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
