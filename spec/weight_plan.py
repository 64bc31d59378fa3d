"""Every stored tensor, as plain data: what it reads, which pure functions it passes through, where its bytes land.

    Entry  <-  steps  <-  pieces (sources)

A *source* is a slice of one checkpoint tensor, seen as a matrix [rows = outputs, columns = inputs] (or a vector). A
*step* names a registered function with literal arguments; where it yields several arrays, `output` picks one. Entries
whose steps begin alike, on the same source, are computed together. The last step of an entry is its storage layout.
An entry's pieces lie one after the other along the first axis of the stored tensor; that is what makes them small jobs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

SHARD_BYTES = 4 << 30
# Executing a plan: elements of a source that one job reads at most, where its entries can be cut; peak bytes for each
# element (values, quotients, codes, packed codes); bytes of a process besides. The last two as measured at full width.
JOB_ELEMENTS = 1 << 26
JOB_BYTES_PER_ELEMENT = 20
PROCESS_BYTES = 512 << 20
# A job that knows its inputs' X^T X, for each number of that: float32, permuted, float64 and its Cholesky factor, inverse.
STATISTICS_BYTES_PER_SQUARE = 32
ALIGNMENT = 4096

ITEM_BITS = {
    "float32": 32, "float16": 16, "bfloat16": 16, "int64": 64, "int32": 32, "int8": 8, "uint8": 8,
    "float8e4m3fn": 8, "float4e2m1": 4, "int4": 4, "uint4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Part of a checkpoint tensor, as the matrix [rows, columns] that steps see.

    `index` picks along the leading axis (an expert of a fused tensor) first; the remaining matrix is transposed where
    the checkpoint stores inputs by outputs; `rows` and `columns` (start, stop) then cut it. A vector has rows only.
    With `interleave`, the matrix's rows are two halves (gate, then up), and `rows` counts them in an order in which so
    many of one and so many of the other alternate: what is stored in that order can then be cut along it.
    `as_stored` reads a quantized tensor's codes and scales; otherwise its values are read, whatever they are stored as.
    """

    tensor: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None = None
    index: int | None = None
    transposed: bool = False
    interleave: int = 0
    as_stored: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in filter(None, (self.rows, self.columns)))

    def halves(self, outputs: int) -> tuple[Source, Source]:
        """The two sources that an interleaved one alternates between; `outputs` is how many rows the matrix has."""
        run, (start, stop) = self.interleave, self.rows
        assert start % (2 * run) == stop % (2 * run) == 0 and outputs % 2 == 0, f"{self} does not hold whole runs"
        gate, up = (
            dataclasses.replace(self, rows=(start // 2 + half, stop // 2 + half), interleave=0)
            for half in (0, outputs // 2)
        )
        return gate, up


@dataclass(frozen=True)
class Step:
    """One pure function by name, its literal arguments, and which of its results to take ("" where it has one)."""

    name: str
    args: tuple[tuple[str, int | float | str], ...] = ()
    output: str = ""

    def __str__(self) -> str:
        words = [self.name, *(f"{key}={value}" for key, value in self.args)]
        return " ".join(words) + (f" -> {self.output}" if self.output else "")


def step(name: str, output: str = "", **args: int | float | str) -> Step:
    """Spell a Step: `step("rtn", bits=4, group_size=128, output="codes")`."""
    return Step(name, tuple(sorted(args.items())), output)


@dataclass(frozen=True)
class Entry:
    """One tensor of the artefact.

    `shape` and `dtype` are as stored. `weight` is the model parameter (or several, joined by "+") it belongs to, and
    `parameters` how many of the model's numbers it represents (0 for scales), for the coverage table; `published` says how
    the checkpoint stores it where that is quantized, in the words of `quant_scheme.in_words` where those say it all.
    `cut` is the axis of the *source matrix* along which the stored tensor's first axis runs: a piece may then be
    computed in parts along it, in multiples of `cut_multiple`; None: only whole.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Source, ...]
    steps: tuple[Step, ...]
    weight: str = ""
    parameters: int = 0
    cut: Literal["rows", "columns"] | None = None
    cut_multiple: int = 1
    published: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8

    def with_layout(self, *layout: Step, **changes: Any) -> Entry:
        """The same values in another storage layout (in place of the last step)."""
        return dataclasses.replace(self, steps=(*self.steps[:-1], *layout), **changes)


@dataclass(frozen=True)
class Placement:
    """Where an entry's bytes lie: shard number, offset and length in bytes."""

    shard: int
    offset: int
    nbytes: int


@dataclass
class WeightPlan:
    """All entries, by name, in the order they are stored. Passes replace entries; nothing is computed until execution."""

    entries: dict[str, Entry]

    def add(self, *entries: Entry) -> None:
        for entry in entries:
            if entry.name in self.entries:
                raise AssertionError(f"the plan already has an entry {entry.name}")
            self.entries[entry.name] = entry

    def replace(self, old: str, *new: Entry) -> None:
        """Put `new` where `old` was."""
        taken = {entry.name for entry in new} & self.entries.keys() - {old}
        if old not in self.entries or taken:
            raise AssertionError(f"cannot replace {old}: it is not in the plan, or {sorted(taken)} are already")
        items: list[tuple[str, Entry]] = []
        for name, entry in self.entries.items():
            items.extend((e.name, e) for e in new) if name == old else items.append((name, entry))
        self.entries = dict(items)

    def placements(self, shard_bytes: int = SHARD_BYTES, starts: Collection[str] = ()) -> dict[str, Placement]:
        """Offsets aligned to 4096 in shards of at most `shard_bytes` (a larger tensor has a shard to itself).

        Entries named in `starts` begin a new shard.
        """
        placements: dict[str, Placement] = {}
        shard = offset = 0
        for entry in self.entries.values():
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
            if offset and (entry.name in starts or offset + entry.nbytes > shard_bytes):
                shard, offset = shard + 1, 0
            placements[entry.name] = Placement(shard, offset, entry.nbytes)
            offset += entry.nbytes
        return placements

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def to_json(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(entry) for entry in self]

    @staticmethod
    def from_json(data: Iterable[dict[str, Any]]) -> WeightPlan:
        """Inverse of `to_json`."""
        return WeightPlan({item["name"]: _entry(item) for item in data})


def _entry(item: dict[str, Any]) -> Entry:
    def pair(value: Any) -> Any:
        return tuple(value) if value is not None else None

    pieces = tuple(
        Source(**{**piece, "rows": pair(piece["rows"]), "columns": pair(piece["columns"])}) for piece in item["pieces"]
    )
    steps = tuple(Step(s["name"], tuple((k, v) for k, v in s["args"]), s["output"]) for s in item["steps"])
    return Entry(**{**item, "shape": tuple(item["shape"]), "pieces": pieces, "steps": steps})
