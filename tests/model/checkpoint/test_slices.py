"""A slice read from a checkpoint equals the slice of the whole tensor, and reads no more than itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from corral.model.checkpoint import Checkpoint
from corral.model.checkpoint.safetensors import open_safetensors
from corral.spec.model_config import parse_config
from corral.spec.weight_plan import Source

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def numbered(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[[str], dict[str, Any]]
) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    """Random tensors "torch.float32.3" and so on: of every dtype, with one to three of the dimensions [5, 6, 7]."""
    directory = tmp_path_factory.mktemp("numbered")
    tensors = {}
    for dtype in DTYPES:
        for shape in ((7,), (6, 7), (5, 6, 7)):
            numbers = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
            tensors[f"{dtype}.{len(shape)}"] = numbers.to(dtype)
    tensors["torch.float32.even"] = tensors["torch.float32.3"][:, :, :6].contiguous()
    save_file(tensors, directory / "model.safetensors")
    config = parse_config(tiny_config("scout"))
    store = open_safetensors(directory)
    return Checkpoint(directory=directory, config=config, store=store, names={}, dropped=()), tensors


def in_order(cut: tuple[int, int]) -> tuple[int, int]:
    return min(cut), max(cut)


@st.composite
def sources(draw: st.DrawFn) -> Source:
    dtype, dims = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 3))
    index = draw(st.integers(0, 4)) if dims == 3 else None
    transposed = dims > 1 and draw(st.booleans())
    size = [7] if dims == 1 else [7, 6] if transposed else [6, 7]
    rows, *columns = [draw(st.tuples(st.integers(0, n), st.integers(0, n)).map(in_order)) for n in size]
    return Source(f"{dtype}.{dims}", rows, columns[0] if columns else None, index, transposed)


@settings(deadline=None, max_examples=150)
@given(source=sources())
def test_a_slice_equals_torchs(numbered: tuple[Checkpoint, dict[str, torch.Tensor]], source: Source) -> None:
    checkpoint, tensors = numbered
    matrix = tensors[source.tensor]
    matrix = matrix if source.index is None else matrix[source.index]
    matrix = matrix.T if source.transposed else matrix
    expected = matrix[slice(*source.rows)]
    if source.columns:
        expected = expected[:, slice(*source.columns)]

    got = checkpoint.read(source)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    assert got.shape == source.shape
    assert np.array_equal(got, expected.float().numpy())  # bf16 and fp16 widen exactly

    raw = checkpoint.read_raw(source)
    assert raw.dtype == {torch.bfloat16: np.uint16, torch.float16: np.float16}.get(expected.dtype, np.float32)
    bits = {2: torch.int16, 4: torch.int32}[expected.itemsize]
    assert raw.tobytes() == expected.view(bits).numpy().tobytes()


@pytest.mark.parametrize(
    "source",
    [
        Source("torch.float32.3", (0, 5), (0, 6)),  # without an index, three dimensions are no matrix
        Source("torch.float32.3", (0, 6), (0, 7), index=5),
        Source("torch.float32.3", (0, 6), (0, 7), index=-1),
        Source("torch.float32.2", (0, 7), (0, 7)),
        Source("torch.float32.2", (0, 7), (0, 7), transposed=True),
        Source("torch.float32.2", (0, 6), (-1, 3)),
        Source("torch.float32.2", (4, 2), (0, 7)),
        Source("torch.float32.2", (0, 6)),
        Source("torch.float32.1", (0, 7), (0, 1)),
    ],
    ids=str,
)
def test_a_slice_out_of_bounds_is_our_mistake(
    numbered: tuple[Checkpoint, dict[str, torch.Tensor]], source: Source
) -> None:
    with pytest.raises(AssertionError, match="does not fit a tensor of shape"):
        numbered[0].read(source)


READ_ONE_EXPERT = """
import resource, sys
from pathlib import Path
from corral.model.checkpoint.safetensors import open_safetensors
store = open_safetensors(Path(sys.argv[1]))
read = lambda expert: store.read_slice("experts", (expert, slice(None), slice(0, 8))).clone()
read(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read(100)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_one_expert_of_a_huge_tensor_costs_one_expert(tmp_path: Path) -> None:
    """As in Maverick: 128 experts in one tensor, here 1 GiB in a sparse file; one has 8 MiB."""
    shape = (128, 1024, 2048)
    header = f'{{"experts":{{"dtype":"F32","shape":{list(shape)},"data_offsets":[0,{1 << 30}]}}}}'.encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 30))
    done = subprocess.run(
        [sys.executable, "-c", READ_ONE_EXPERT, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 64 << 10, f"{int(done.stdout) >> 10} MiB for an expert of 8 MiB"


@settings(deadline=None, max_examples=100)
@given(data=st.data(), transposed=st.booleans(), run=st.sampled_from([1, 3]))
def test_halves_alternate_in_runs(
    numbered: tuple[Checkpoint, dict[str, torch.Tensor]], data: st.DataObject, transposed: bool, run: int
) -> None:
    """Rows 0-2 are gate's and 3-5 up's: in runs of one they are read as 0 3 1 4 2 5, in runs of three as they are."""
    checkpoint, tensors = numbered
    whole = tensors["torch.float32.3"][2]
    whole = whole[:, :6].t() if transposed else whole
    order = [0, 3, 1, 4, 2, 5] if run == 1 else [0, 1, 2, 3, 4, 5]
    start, stop = in_order(data.draw(st.tuples(st.integers(0, 6), st.integers(0, 6)).map(in_order)))
    rows = start // (2 * run) * 2 * run, stop // (2 * run) * 2 * run
    columns = in_order(data.draw(st.tuples(st.integers(0, 6), st.integers(0, 6))))
    name = "torch.float32.even" if transposed else "torch.float32.3"
    source = Source(name, rows, columns, index=2, transposed=transposed, interleave=run)
    expected = whole[order][slice(*rows), slice(*columns)].numpy()
    np.testing.assert_array_equal(checkpoint.read_piece(source), expected)
