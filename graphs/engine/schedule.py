"""What a TensorRT for RTX engine says of itself: its schedule, which lies in the plan as plain text.

Undocumented, and read for the pinned version only. It lists per profile every kernel with the ONNX layers fused into
it, every constant with type and bytes, and every region of memory. Kernels themselves are compiled where the engine
runs, so all bytes that are not this text are weights: that is how a weight that silently became float shows.
"""

from __future__ import annotations

import math
import mmap
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TEXT = re.compile(rb"[\t\n\r\x20-\x7e]{32,}")
# Each schedule begins so; those within a kernel that is fused where the engine runs have no memory of a user's.
SCHEDULE = b"\n  n_accelerators = "
GAP = 4096  # bytes; between two texts of a schedule there are fewer
HEAD_END = b"\ndescriptors {"
KERNEL = re.compile(
    rb"\n\s*(?P<kind>function|fully_connected|runtime_fusion)=\{ name=\"?(?P<name>[^\s\"]+)\"? [^\n]*?\n?"
    rb"[^\n]*?layers=\"(?P<layers>[^\"\n]*)\""
)
# A kernel's operands; of functions "input_args", of others "input". Their names are quoted, and may hold braces.
READS = re.compile(rb" input(?:_args)?=\{((?:[^\"}]|\"[^\"]*\")*)\}")
WRITES = re.compile(rb" output(?:_args)?=\{((?:[^\"}]|\"[^\"]*\")*)\}")
QUOTED = re.compile(rb'"([^"]*)"')
LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
TENSOR = re.compile(
    rb"\n\s*tensor=\{ (?P<constant>[^\n]*?const_payload_size=(?P<bytes>\d+))?[^\n]*?dims=\{ (?P<dims>[^}]*)\}"
    rb"[^\n]*? name=\"(?P<name>[^\"]*)\"(?: offset=(?P<offset>\d+))?[^\n]*? region=\"?(?P<region>[^\s\"]+)"
    rb"[^\n]*? type=(?P<type>\w+) \}"
)
# Part of a tensor, or one in another shape, by the name of that tensor.
VIEW = re.compile(
    rb"\n\s*sub_tensor=\{ base=\"(?P<base>[^\"]*)\"[^\n]*? dims=\{ (?P<dims>[^}]*)\}[^\n]*? name=\"(?P<name>[^\"]*)\""
    rb"[^\n]*? type=(?P<type>\w+) \}"
)
REGION = re.compile(rb"\n  region = \{ name=(?P<name>\S+) size=(?P<bytes>\d+) [^\n]*?type=user place=accelerator")
WEIGHTS = re.compile(r"__mye\d+-consts")
BITS = {
    "float": 32,
    "half": 16,
    "bfloat16": 16,
    "int8": 8,
    "fp8_e4m3": 8,
    "int4": 4,
    "fp4_e2m1": 4,
    "int64": 64,
    "int32": 32,
    "bool": 8,
}


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel reads or writes; sizes that only a step decides are words.

    `most_bytes` is what the memory that it lies in leaves for it: as much as it takes in the largest step, or more where
    larger tensors lie there before or after it. 0 for constants.
    """

    shape: tuple[int | str, ...]
    type: str
    most_bytes: int = 0

    @property
    def known_bytes(self) -> int:
        """Bytes of the sizes that are known: of one block, where the number of blocks is open."""
        return math.prod(d for d in self.shape if isinstance(d, int)) * BITS.get(self.type, 0) // 8


@dataclass(frozen=True)
class Kernel:
    """One kernel of a schedule. `kind` is TensorRT's word: function, fully_connected, runtime_fusion."""

    name: str
    kind: str
    layers: tuple[str, ...]  # the ONNX nodes fused into it
    reads: tuple[Operand, ...] = ()
    writes: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """One profile's: its kernels in order, bytes of weights by type, bytes of device memory besides."""

    kernels: tuple[Kernel, ...]
    weights: Mapping[str, int]
    scratch_bytes: int

    def unfused_weights(self) -> list[Kernel]:
        """Kernels that write a dequantized weight to memory, for a matrix product to read it back."""
        return [
            kernel
            for kernel in self.kernels
            if any(layer.endswith("DequantizeLinear") for layer in kernel.layers)
            and not any("MatMul" in layer for layer in kernel.layers)
        ]


def read_schedules(engine: Path) -> list[Schedule]:
    """The schedules of an engine, in its profiles' order; empty where its text is not as expected."""
    with _mapped(engine) as plan:
        sections = [plan[start:end] for start, end in _sections(plan)]
    return [_schedule(section) for section in sections if REGION.search(section[: section.find(HEAD_END)])]


def weight_bytes(engine: Path) -> int:
    """Bytes of an engine that are not its schedules' text: its weights and very little else."""
    with _mapped(engine) as plan:
        return len(plan) - sum(end - start for start, end in _sections(plan))


@contextmanager
def _mapped(engine: Path) -> Iterator[mmap.mmap]:
    with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        yield plan


def _sections(plan: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Where the schedules lie, each to the next one's begin or to the end of text: weights follow, and they are large."""
    start, end = plan.find(SCHEDULE), 0
    while start >= 0:
        if start >= end:
            end = _text_end(plan, start)
        following = plan.find(SCHEDULE, start + 1, end)
        yield start, end if following < 0 else following
        start = following if following >= 0 else plan.find(SCHEDULE, end)


def _text_end(plan: mmap.mmap, start: int) -> int:
    """Where text ends that has no gap of more than GAP bytes. Looks no further: weights are many GB of anything."""
    end = start
    while (match := TEXT.search(plan[end : end + 2 * GAP])) is not None and match.start() <= GAP:
        end += match.end()
    return end


def _schedule(text: bytes) -> Schedule:
    regions = {found["name"]: int(found["bytes"]) for found in REGION.finditer(text)}
    weights: Counter[str] = Counter()
    tensors: dict[bytes, Operand] = {}
    for found in TENSOR.finditer(text):
        kind, region = found["type"].decode(), found["region"].decode("latin1")
        if found["constant"] and WEIGHTS.fullmatch(region):
            weights[kind] += int(found["bytes"])
        room = regions.get(found["region"], 0) - int(found["offset"] or 0)
        tensors[found["name"]] = Operand(_shape(found["dims"]), kind, max(room, 0))
    for found in VIEW.finditer(text):
        base = tensors.get(found["base"])
        tensors[found["name"]] = Operand(_shape(found["dims"]), found["type"].decode(), base.most_bytes if base else 0)
    kernels = []
    for found in KERNEL.finditer(text):
        reads, writes = (
            tuple(tensors[name] for name in QUOTED.findall(list_[1]) if name in tensors) if list_ else ()
            for list_ in (READS.search(found[0]), WRITES.search(found[0]))
        )
        layers = tuple(dict.fromkeys(LAYER.findall(found["layers"].decode("latin1"))))
        kernels.append(Kernel(found["name"].decode("latin1"), found["kind"].decode(), layers, reads, writes))
    return Schedule(tuple(kernels), dict(weights), sum(regions.values()))


def _shape(dims: bytes) -> tuple[int | str, ...]:
    words = dims.decode("latin1").split()
    return tuple(int(word) if word.isdigit() else word.strip('"') for word in words)
