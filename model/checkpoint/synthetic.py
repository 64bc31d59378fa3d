"""`synthetic:PRESET`: a checkpoint whose values are made when they are read, with real names, shapes and dtype.

Every row of a tensor is a window into one pool of normal numbers; where it begins comes from a counter-based generator
(Philox) keyed by seed and tensor name, at the row's number. So any slice is made without the rest, and equals the same
slice of the whole. The trade: a copy instead of a generator's work for each number (memory speed), for rows that are
shifted parts of the same 4 million numbers. Experts and layers differ; the numbers are not for statistics.

Scale is 1/sqrt(fan-in), so that activations keep their size; one input channel in 1024 is eight times as large. The
mean is zero: otherwise all tokens align and one expert gets them all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corral.model.checkpoint.names import EMBEDDING, FORMS, expected_parameters
from corral.model.checkpoint.store import TensorInfo
from corral.spec.presets import SYNTHETIC, Preset, preset_named

POOL = 1 << 22  # numbers: 8 MiB of bfloat16, which the largest cache of a CPU holds, or nearly
OUTLIER_EVERY, OUTLIER_FACTOR = 1024, 8.0
NORM_SPREAD = 0.05
FORM = FORMS[1]  # of the published multimodal files


@dataclass(frozen=True)
class SyntheticStore:
    """The tensors of a preset. `seed` gives other values of the same kind."""

    tensors: Mapping[str, TensorInfo]
    seed: int = 0

    def read_slice(self, name: str, where: tuple[int | slice, ...]) -> Tensor:
        """`tensor[where]`, made on the fly."""
        shape = self.tensors[name].shape
        cuts = [range(n)[w] if isinstance(w, slice) else w for n, w in zip(shape, where, strict=False)]
        cuts += [range(n) for n in shape[len(cuts) :]]
        *leading, columns = cuts
        rows = np.zeros(1, np.int64)
        for n, cut in zip(shape, leading, strict=False):
            rows = (rows[:, None] * n + np.atleast_1d(np.asarray(cut, np.int64))).reshape(-1)
        assert isinstance(columns, range), "a single column is never read"
        values = self._rows(name, rows, columns)
        if len(shape) > 1:
            inputs_first = len(shape) == 3  # fused experts are stored inputs by outputs
            inputs = leading[-1] if inputs_first else columns
            assert isinstance(inputs, range)
            outliers = np.asarray([i for i in _outliers(shape[-2 if inputs_first else -1]) if i in inputs], np.int64)
            at = torch.from_numpy(outliers - inputs.start)
            matrix = values.view(-1, len(inputs), len(columns)) if inputs_first else values
            if name != FORM.source(EMBEDDING) and len(at):
                matrix[:, at] *= OUTLIER_FACTOR  # the inputs are the second axis of both
        return values.reshape([len(cut) for cut in cuts if isinstance(cut, range)])

    def _rows(self, name: str, rows: NDArray[np.int64], columns: range) -> Tensor:
        """Rows of the tensor seen as [all leading axes, last axis], between two columns."""
        shape = self.tensors[name].shape
        pool = _pool(self.seed, _scale(name, shape), 1.0 if len(shape) == 1 else 0.0)
        first = int(rows[0]) // 4 * 4 if len(rows) else 0
        last = int(rows[-1]) + 1 if len(rows) else 0
        key = hashlib.blake2b(f"{self.seed}:{name}".encode(), digest_size=16).digest()
        generator = np.random.Philox(key=np.frombuffer(key, "<u8"))
        generator.advance(first // 4)  # four numbers a step
        raw = generator.random_raw(max(last - first, 0))[rows - first]
        starts = (raw % np.uint64(POOL - shape[-1])).astype(np.int64) + columns.start
        windows = np.lib.stride_tricks.sliding_window_view(pool, len(columns))
        return torch.from_numpy(windows[starts]).view(torch.bfloat16)


def is_synthetic(path: object) -> bool:
    """Whether a checkpoint's name is `synthetic:…`."""
    return str(path).startswith(SYNTHETIC)


def parse_synthetic(name: str) -> Preset:
    """`synthetic:scout` -> the preset."""
    return preset_named(name.removeprefix(SYNTHETIC))


def open_synthetic(preset: Preset, name: str, seed: int = 0) -> SyntheticStore:
    """All tensors of a preset's decoder; `name` stands where a file would."""
    shapes = expected_parameters(preset.model)
    tensors = [TensorInfo(FORM.source(ours), Path(name), preset.dtype, shape) for ours, shape in shapes.items()]
    return SyntheticStore({tensor.name: tensor for tensor in tensors}, seed)


def _scale(name: str, shape: tuple[int, ...]) -> float:
    if len(shape) == 1:
        return NORM_SPREAD
    if name == FORM.source(EMBEDDING):
        return 1.0  # a row is looked up: its fan-in is one
    return 1 / math.sqrt(shape[1])  # outputs by inputs, or experts by inputs by outputs


def _outliers(inputs: int) -> list[int]:
    """Which input channels are large: the same ones in every layer, as in trained models."""
    count = max(1, inputs // OUTLIER_EVERY)
    return sorted(int(i) for i in np.random.Generator(np.random.Philox(inputs)).choice(inputs, count, replace=False))


@lru_cache(maxsize=8)
def _pool(seed: int, scale: float, mean: float) -> NDArray[np.uint16]:
    """Normal numbers in bfloat16, as bits."""
    values = np.random.Generator(np.random.Philox(seed)).standard_normal(POOL, np.float32)
    values = (values - values.mean()) * np.float32(scale) + np.float32(mean)
    bits: NDArray[np.uint16] = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    return bits
