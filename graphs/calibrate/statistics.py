"""Statistics files: what was seen of each matrix's inputs. Named by content, beside the bundle that is being compiled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from corral.graphs.execute.shards import PARTIAL
from corral.model.checkpoint.checkpoint import Checkpoint, alternating
from corral.model.checkpoint.names import HEAD
from corral.spec.weight_plan import Source

# Matrices that read what another one reads: their inputs are gathered once, under that one's name.
SAME_INPUTS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True)
class Statistics:
    """The files of one calibration in `directory`, and whose they are. Holds no open file: it pickles into workers.

    `names`: tensor of the checkpoint -> our parameter.
    """

    directory: Path
    key: str
    names: Mapping[str, str]

    def of(self, source: Source) -> dict[str, NDArray[Any]]:
        """All that is known of a matrix (or a norm's vector): sums over its inputs, and AWQ's scales cut to its rows.

        "layer_largest" is "largest" of all experts of the layer together, or of a dense matrix.
        """
        name = self.names[source.tensor]
        site, found = input_site(name), dict[str, NDArray[Any]]()
        if self.path(site).exists():
            found = self.inputs(site)
            found["layer_largest"] = found["largest"]
        if source.index is not None and self.path(site, source.index).exists():
            found |= self.inputs(site, source.index)
        return found | self._scales(name, source)

    def inputs(self, site: str, expert: int | None = None) -> dict[str, NDArray[Any]]:
        """The sums over the inputs of a site, see `InputSums.arrays`; without `expert` those of all of a layer's together."""
        from safetensors.numpy import load_file

        return load_file(self.path(site, expert))

    def _scales(self, name: str, source: Source) -> dict[str, NDArray[Any]]:
        from safetensors import safe_open

        path, found = self.scales_path(name), {}
        if path.exists():
            with safe_open(path, framework="numpy") as file:
                for kind, cut in (("input_scales", source.columns), ("output_scales", source.rows)):
                    if f"{name}.{kind}" in file.keys():  # noqa: SIM118  # no mapping
                        scales = file.get_tensor(f"{name}.{kind}")
                        whole = scales[source.index] if scales.ndim == 2 else scales
                        if kind == "output_scales" and source.interleave:
                            gate, up = whole.reshape(2, -1, 1)
                            whole = alternating(gate, up, source.interleave)[:, 0]
                        found[kind] = whole[slice(*cut)] if cut else whole
        return found

    def tokens(self, site: str, expert: int | None = None) -> int:
        """How many tokens a matrix saw."""
        from safetensors import safe_open

        with safe_open(self.path(site, expert), framework="numpy") as file:
            return int(file.get_tensor("tokens").item())

    def path(self, site: str, expert: int | None = None) -> Path:
        """Where the inputs' sums of a site lie, or those of one of its experts."""
        of = "" if expert is None else f".{expert}"
        return self.directory / f"statistics-{self.key}-{site}{of}.safetensors"

    def scales_path(self, name: str) -> Path:
        """Where AWQ's scales of a parameter's layer lie; those of what comes after the layers lie together."""
        part = ".".join(name.split(".")[:2]) if name.startswith("layers.") else "head"
        return self.directory / f"statistics-{self.key}-scales.{part}.safetensors"

    def hidden_path(self, layer: int) -> Path:
        """Where the calibration text's hidden states before a layer lie."""
        return self.directory / f"hidden-{self.key}-{layer}.bin"

    def save(self, path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write a statistics file, whole or not at all."""
        from safetensors.numpy import save

        partial = path.with_name(path.name + PARTIAL)
        with partial.open("wb") as file:
            file.write(save(dict(arrays)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def remove(self) -> None:
        """Remove all files of this calibration."""
        for kind in ("statistics", "hidden"):
            for path in self.directory.glob(f"{kind}-{self.key}-*"):
                path.unlink()


def statistics_of(checkpoint: Checkpoint, directory: Path, key: str) -> Statistics:
    """The statistics of a checkpoint named `key`, in `directory`."""
    return Statistics(directory, key, {checkpoint.source(name): name for name in (*checkpoint.names, HEAD)})


def input_site(parameter: str) -> str:
    """The name under which a matrix's inputs are gathered: `layers.3.self_attn.q_proj` for q, k and v alike."""
    parts = parameter.removesuffix(".weight").split(".")
    return ".".join([*parts[:-1], SAME_INPUTS.get(parts[-1], parts[-1])])
