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
    """One stored tensor: its own name, where it lies, dtype (as in a weight plan: "bfloat16", …) and shape."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
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


def listed(names: Collection[str]) -> str:
    """Join names for an error message, the first few of many."""
    first = ", ".join(list(names)[:LISTED])
    return first if len(names) <= LISTED else f"{first} and {len(names) - LISTED} more"
