"""What a bundle knows of the inside of its engines: the sidecars that `build` wrote, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from corral.graphs.engine.schedule import Kernel, Operand
from corral.spec.bundle import Bundle
from corral.spec.errors import InputError
from corral.spec.read_record import read_record


@dataclass(frozen=True)
class Unfused:
    """A kernel that writes dequantized weights to memory, for a matrix product to read them back."""

    kernel: str
    layers: tuple[str, ...]
    writes: tuple[Operand, ...]

    @property
    def known_bytes(self) -> int:
        """For a block of rows."""
        return sum(tensor.known_bytes for tensor in self.writes)

    @property
    def most_bytes(self) -> int:
        """In the largest step."""
        return sum(tensor.most_bytes for tensor in self.writes)


@dataclass(frozen=True, kw_only=True)
class ProfileReport:
    """One optimization profile; without kernels where the engine's schedule could not be read."""

    name: str
    axes: dict[str, tuple[int, ...]]  # least, likely, most
    weights: dict[str, int] = field(default_factory=dict)  # bytes by type
    scratch_bytes: int = 0
    kernels: tuple[Kernel, ...] = ()
    unfused_weights: tuple[Unfused, ...] = ()

    @property
    def ranges(self) -> str:
        return ", ".join(f"{axis} {sizes[0]} to {sizes[-1]}" for axis, sizes in self.axes.items() if sizes)


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """One engine. `weight_bytes` is what the file holds, `expected_weight_bytes` what the weights' bits say."""

    built_with: str
    graph: str
    capabilities: tuple[str, ...]
    bytes: int
    weight_bytes: int
    expected_weight_bytes: int
    profiles: tuple[ProfileReport, ...]


@dataclass(frozen=True)
class Sidecars:
    """Engines by file name: as JSON, as it lies there, and as data."""

    json: Mapping[str, Any]
    reports: Mapping[str, EngineReport]


def read_sidecars(bundle: Bundle, name: str | None) -> Sidecars:
    """All engines of a bundle, or the one whose file is called `name`. Raises InputError where there is none."""
    records = [engine for engine in bundle.manifest.engines if name in (None, engine.path)]
    if not records:
        there = ", ".join(engine.path for engine in bundle.manifest.engines) or "none"
        wanted = f'engine "{name}"' if name else "engine"
        raise InputError(f"{bundle.directory} has no {wanted}; it has: {there}. `corral build` makes them.")
    found = {engine.path: _read(bundle, engine.sidecar) for engine in records}
    return Sidecars({path: one[0] for path, one in found.items()}, {path: one[1] for path, one in found.items()})


def _read(bundle: Bundle, sidecar: str) -> tuple[Any, EngineReport]:
    path = bundle.path(sidecar)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return data, read_record(EngineReport, data, str(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable: {error}. Build the engine again with `corral build`.") from None
