"""Experts that are stored one by one, presented as the fused tensors of the published bf16 files.

    experts.E.gate_proj.weight, .up_proj.weight  [width, hidden]  ->  experts.gate_up_proj  [experts, hidden, 2 * width]
    experts.E.down_proj.weight                   [hidden, width]  ->  experts.down_proj     [experts, width, hidden]

Quantized Llama 4 checkpoints are stored so, because quantizers see only linear layers: llm-compressor unrolls the fused
module (its `modeling/moe/llama4.py`: "Extract individual expert weights from the batched parameters"), and
`meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8` has the same names (vLLM's `tests/models/multimodal/generation/
test_maverick.py`, which rebuilds that checkpoint in small: `feed_forward.experts.{expert_idx}.gate_proj.weight` …).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from corral.model.checkpoint.store import Complaints, QuantizedTensorStore, TensorInfo, TensorStore, cuts
from corral.spec.model_config import ModelConfig

NAME = re.compile(r"(?P<experts>.*\.feed_forward\.experts)\.\d+\.\w+\.weight")
# The fused tensor's last name -> the matrices whose outputs lie in it one after the other.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class ExpertStore:
    """A store in which each of `fused` is one tensor [experts, inputs, outputs]: expert -> its matrices' names."""

    stored: TensorStore
    fused: Mapping[str, tuple[tuple[str, ...], ...]]
    tensors: Mapping[str, TensorInfo]

    def read_slice(self, name: str, where: tuple[int | slice, ...]) -> Tensor:
        """`tensor[where]`, reading only the experts, and of these the rows and columns, that it takes."""
        if name not in self.fused:
            return self.stored.read_slice(name, where)
        expert, *matrix = cuts(self.tensors[name].shape, where)
        experts = [expert] if isinstance(expert, int) else expert
        slices = [
            torch.cat([self.stored.read_slice(*part) for part in self._parts(name, e, matrix)]).t() for e in experts
        ]
        return slices[0] if isinstance(expert, int) else torch.stack(slices)

    def read_codes(self, name: str, where: tuple[int | slice, ...]) -> dict[str, Tensor]:
        """Codes [inputs, outputs], and scales and zeros [groups, outputs] of one expert's slice; see `QuantizedTensorStore`."""
        stored: QuantizedTensorStore = self.stored  # type: ignore[assignment]  # the tensor is published quantized
        if name not in self.fused:
            return stored.read_codes(name, where)
        expert, *matrix = cuts(self.tensors[name].shape, where)
        assert isinstance(expert, int), "codes are read expert by expert"
        parts = [stored.read_codes(*part) for part in self._parts(name, expert, matrix)]
        return {key: torch.cat([part[key] for part in parts]).t() for key in parts[0]}

    def _parts(self, name: str, expert: int, matrix: list[int | range]) -> Iterator[tuple[str, tuple[slice, slice]]]:
        """Which slices [outputs, inputs] of which matrices make up [inputs, outputs] of an expert, in order."""
        inputs, outputs = matrix
        assert isinstance(inputs, range) and isinstance(outputs, range), "single rows are never read"
        first = 0
        for part in self.fused[name][expert]:
            rows = self.stored.tensors[part].shape[0]
            start, stop = (min(max(edge - first, 0), rows) for edge in (outputs.start, outputs.stop))
            if start < stop or outputs.start == outputs.stop:
                yield part, (slice(start, stop), slice(inputs.start, inputs.stop))
            first += rows


def fuse_experts(store: TensorStore, config: ModelConfig, complaints: Complaints) -> TensorStore:
    """The store with fused experts, or itself where they are fused already.

    Adds to `complaints`: experts that are missing, of a wrong shape, or stored otherwise than the rest of their layer.
    """
    layers = dict.fromkeys(match["experts"] for match in map(NAME.fullmatch, store.tensors) if match)
    if not layers:
        return store
    hidden, width, tensors = config.hidden_size, config.intermediate_size, dict(store.tensors)
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    fused: dict[str, tuple[tuple[str, ...], ...]] = {}
    for experts in layers:
        for last, matrices in FUSED.items():
            table = tuple(
                tuple(f"{experts}.{expert}.{matrix}.weight" for matrix in matrices)
                for expert in range(config.num_local_experts)
            )
            parts = {name: tensors.pop(name, None) for row in table for name in row}
            present = [part for part in parts.values() if part is not None]
            if not present:
                continue
            _check(parts, shapes, complaints)
            if f"{experts}.{last}" in tensors:
                complaints.setdefault("both fused and one by one", []).append(f"{experts}.{last}")
            outputs, inputs = shapes[matrices[0]]
            shape = (config.num_local_experts, inputs, outputs * len(matrices))
            fused[f"{experts}.{last}"] = table
            tensors[f"{experts}.{last}"] = TensorInfo(
                f"{experts}.{last}", present[0].file, present[0].dtype, shape, present[0].published, tuple(present)
            )
    return ExpertStore(store, fused, tensors)


def _check(
    parts: Mapping[str, TensorInfo | None], shapes: Mapping[str, tuple[int, int]], complaints: Complaints
) -> None:
    stored_as: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, part in parts.items():
        if part is None:
            complaints.setdefault("missing", []).append(name)
            continue
        expected = shapes[name.split(".")[-2]]
        if part.shape != expected:
            found = f"{name} {list(part.shape)} not {list(expected)}"
            complaints.setdefault("of another shape than config.json says", []).append(found)
        stored_as[part.dtype, part.published].append(name)
    most = max(stored_as.values(), key=len, default=[])
    for (dtype, published), names in stored_as.items():
        if names is not most:
            others = [f"{name} ({published or dtype})" for name in names]
            complaints.setdefault("stored otherwise than the layer's other experts", []).extend(others)
