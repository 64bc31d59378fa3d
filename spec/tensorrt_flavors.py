"""The seam: `tensorrt` or `tensorrt_rtx`, and in one table all that differs between them.

Both modules have the same Builder, OnnxParser, profiles and engines; what builds and what runs engines is written once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Flavor:
    """One of the two modules. `version` is the one corral was written against; the first two numbers must agree."""

    module: str
    distribution: str
    version: str
    named_capabilities: bool  # builds for compute capabilities that are named; otherwise for the GPU that is there
    plugins: bool  # takes kernels of others
    engine_validity: bool  # can say whether an engine runs on this device without opening it
    timing_cache: bool  # times kernels while it builds, and can keep what it measured
    runtime_cache: bool  # finishes compiling kernels where the engine runs, and can keep the result
    text_schedule: bool  # an engine holds its schedule as text (undocumented; read only for this version)
    executed: bool  # whether corral's own tests run this module

    def pip(self, version: str = "") -> str:
        """The line that installs it, in that version or in the table's."""
        return f'pip install "{self.distribution}=={version or self.version}"'


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
            timing_cache=False,
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
            timing_cache=True,
            runtime_cache=False,
            text_schedule=False,
            executed=False,
        ),
    )
}
