"""The kernels' storage layout and FP8 weights: element by element against the description, bounds, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from corral.graphs.execute.job import plan_jobs, run_job
from corral.graphs.execute.steps import STEPS
from corral.graphs.quantize.e4m3 import e4m3
from corral.graphs.quantize.fragments import fragment_scales, pack_fragments
from corral.graphs.quantize.rtn import rtn
from corral.spec.errors import InputError
from corral.spec.weight_plan import Entry, Source, WeightPlan, step

Array = NDArray[Any]


def element(tile: bytes, bits: int, lane: int, j: int, register: int, i: int) -> int:
    """Element i of a register of a tile's j-th mma, by the words at the head of grouped_product.cuh."""
    if bits == 4:
        word = int.from_bytes(tile[16 * lane + 4 * j :][:4], "little")
        return word >> 4 * (register + 4 * i) & 15
    if bits == 8:
        upper, p = register % 2, register // 2
        return tile[512 * (j // 2) + 16 * lane + 4 * (2 * (j % 2) + p) + upper + 2 * i]
    return int.from_bytes(tile[512 * j + 16 * lane + 4 * register + 2 * i :][:2], "little")


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_weight_is_where_its_lane_looks_for_it(bits: int) -> None:
    rng = np.random.default_rng(bits)
    matrix = rng.integers(0, 2 ** min(bits, 8), (48, 128)).astype(np.float16 if bits == 16 else np.uint8)
    packed = pack_fragments(matrix, bits=bits)
    assert packed.shape == (3, 2, 1024 if bits > 4 else 512)
    assert packed.dtype == matrix.dtype
    for tile, row in enumerate(packed):
        for at, stored in enumerate(row):
            content = np.ascontiguousarray(stored).tobytes()
            for lane in range(32):
                g, t = divmod(lane, 4)
                for j, register, i in np.ndindex(4, 4, 2):
                    upper, p = register % 2, register // 2
                    weight = matrix[16 * tile + 8 * upper + g, 64 * at + 16 * t + 4 * j + 2 * p + i]
                    expected = int(weight.view(np.uint16)) if bits == 16 else int(weight)
                    assert element(content, bits, lane, j, register, i) == expected


def test_scales_of_the_two_outputs_of_a_lane_lie_together() -> None:
    scales = np.arange(32 * 3, dtype=np.float32).reshape(32, 3)
    stored = fragment_scales(scales, dtype="float16")
    assert stored.shape == (2, 3, 8, 2)
    assert stored.dtype == np.float16
    for tile, group, g, upper in np.ndindex(2, 3, 8, 2):
        assert stored[tile, group, g, upper] == scales[16 * tile + 8 * upper + g, group]


def test_what_does_not_fit_fp16_is_refused() -> None:
    with pytest.raises(InputError, match=r"magnitude 7e\+04 does not fit float16, whose largest value is 65504"):
        fragment_scales(np.full((16, 1), 70000, np.float32), dtype="float16")
    with pytest.raises(InputError, match="does not fit float16"):
        pack_fragments(np.full((16, 64), np.nan, np.float32), bits=16)


@pytest.mark.parametrize("shape", [(8, 64), (16, 32), (24, 64)])
def test_half_tiles_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(AssertionError, match="tiles of 16 by 64"):
        pack_fragments(np.zeros(shape, np.uint8), bits=8)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 32)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    )
)
def test_fp8_values_are_within_half_a_step(weight: Array) -> None:
    stored = e4m3(weight)
    codes = stored["codes"].astype(np.float64)
    assert np.isfinite(codes).all()
    assert stored["scales"].shape == (len(weight), 1)
    assert (stored["scales"] > 0).all()
    scales = stored["scales"].astype(np.float64)
    # A mantissa of 3 bits: half a step is 2^-4 of the value, and for subnormals half of 2^-9.
    bound = np.maximum(np.abs(weight) * 2.0**-4, scales * 2.0**-10) * (1 + 1e-5)
    assert (np.abs(codes * scales - weight) <= bound).all()


@given(hnp.arrays(np.float32, (3, 16), elements=st.floats(-(2.0**10), 2.0**10, width=32)))
def test_fp8_codes_are_torchs_rounding_and_survive_another(weight: Array) -> None:
    stored = e4m3(weight)
    want = (torch.tensor(weight) / torch.tensor(stored["scales"])).clamp(-448, 448).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(stored["codes"].view(np.uint8), want.view(torch.uint8).numpy())
    again = e4m3(stored["codes"].astype(np.float32) * stored["scales"])
    np.testing.assert_array_equal(again["codes"].view(np.uint8) & 0x7F, stored["codes"].view(np.uint8) & 0x7F)


def test_fp8_by_hand() -> None:
    stored = e4m3(np.array([[448, -224, 1, 17, 0], [0, 0, 0, 0, 0]], np.float32))
    # 17 lies between 16 (0x58) and 18 (0x59): to even. Sign, 4 bits of exponent with bias 7, 3 of mantissa.
    assert stored["codes"].view(np.uint8).tolist() == [[0x7E, 0xF6, 0x38, 0x58, 0x00], [0] * 5]
    assert stored["scales"].tolist() == [[1], [1]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_fp8_refuses_what_is_not_finite(value: float) -> None:
    weight = np.ones((2, 4), np.float32)
    weight[1, 2] = value
    with pytest.raises(InputError, match="no FP8 code can stand for"):
        e4m3(weight)


@pytest.mark.parametrize(("codes", "bits"), [("int4", 4), ("fp8", 8)])
def test_a_plan_makes_the_layout_whole_or_in_parts(codes: str, bits: int) -> None:
    experts, outputs, inputs, group = 2, 64, 128, 32
    rng = np.random.default_rng(1)
    tensor = rng.standard_normal((experts, outputs, inputs)).astype(np.float32)
    quantize = (
        step("rtn", output="codes", bits=4, group_size=group) if codes == "int4" else step("e4m3", output="codes")
    )
    pieces = tuple(Source("w", (0, outputs), (0, inputs), index=e) for e in range(experts))
    tile_bytes = 16 * 64 * bits // 8
    entry = Entry(
        name="down.codes",
        dtype="uint8",
        shape=(experts, outputs // 16, inputs // 64, tile_bytes),
        pieces=pieces,
        steps=(quantize, step("pack_fragments", bits=bits)),
        cut="rows",
        cut_multiple=16,
    )
    plan = WeightPlan({entry.name: entry})

    def read(source: Source) -> Array:
        assert source.columns
        return tensor[source.index, slice(*source.rows), slice(*source.columns)]

    def execute(limit: int) -> list[bytes]:
        jobs = plan_jobs(plan, plan.placements(), limit)
        return [data for job in jobs for _, data in run_job(job, read)]

    whole, parts = execute(1 << 20), execute(16 * inputs)
    assert (len(whole), len(parts)) == (2, 8)
    assert b"".join(whole) == b"".join(parts)
    quantizer = {"int4": lambda w: rtn(w, bits=4, group_size=group), "fp8": e4m3}[codes]
    by_hand = [STEPS["pack_fragments"](quantizer(matrix)["codes"], bits=bits) for matrix in tensor]
    assert b"".join(whole) == np.stack(by_hand).tobytes()
