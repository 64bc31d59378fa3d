"""What every checkpoint format gives: the tensors there are, and any slice of one of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

LISTED = 8  # names shown before "and N more"


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its own name, the file it lies in, dtype (as in a weight plan: "bfloat16", …) and shape.

    Several stored tensors may be presented as one, of the dtype that reading it gives: `parts` are those it is made of,
    and `published` says how its numbers are quantized ("int4 g128", "fp8 per output", …; "" where they are not).
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    published: str = ""
    parts: tuple[TensorInfo, ...] = ()
    other_files: tuple[Path, ...] = ()  # where it lies in several

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file, *self.other_files)


class TensorStore(Protocol):
    """A checkpoint's tensors in one on-disk format. Holds no open file, so that it pickles into worker processes."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor, by its own name."""
        ...

    def read_slice(self, name: str, where: tuple[int | slice, ...]) -> Tensor:
        """`tensor[where]`, reading no more of the file than that. The result may alias the mapped file: copy it."""
        ...


class QuantizedTensorStore(TensorStore, Protocol):
    """A store some of whose tensors are quantized; `read_slice` gives their values."""

    def read_codes(self, name: str, where: tuple[int | slice, ...]) -> dict[str, Tensor]:
        """Of `tensor[where]`: "codes", unsigned, uint8, and float32 "scales", one for each group of inputs; of asymmetric
        ones "zeros", too, uint8.

        As in `spec/quant_scheme.py`; only for tensors that are published so.
        """
        ...


# What is wrong with a checkpoint's tensors -> the names of those it is wrong with: told in one error.
Complaints = dict[str, list[str]]


def cuts(shape: tuple[int, ...], where: tuple[int | slice, ...]) -> list[int | range]:
    """`where` of a tensor of `shape`, axis by axis: an index, or the range that a slice takes."""
    every = (*where, *(slice(None) for _ in shape[len(where) :]))
    return [range(n)[cut] for n, cut in zip(shape, every, strict=True)]


def listed(names: Collection[str]) -> str:
    """Join names for an error message, the first few of many."""
    first = ", ".join(list(names)[:LISTED])
    return first if len(names) <= LISTED else f"{first} and {len(names) - LISTED} more"
