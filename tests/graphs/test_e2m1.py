"""FP4: every number against ml_dtypes' casts, every scale against trying all there are; property-based."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from corral.graphs.quantize import e2m1
from corral.graphs.quantize.e2m1 import encode, mxfp4, nearest, nvfp4
from corral.graphs.quantize.pack import pack_rows
from corral.spec.errors import InputError

finite = st.floats(-(2.0**100), 2.0**100, width=32)
METHODS = ("rtn", "rtn-mse")
FORMATS = {"nvfp4": (nvfp4, 16, ml_dtypes.float8_e4m3fn), "mxfp4": (mxfp4, 32, ml_dtypes.float8_e8m0fnu)}


@st.composite
def matrices(draw: st.DrawFn) -> NDArray[np.float32]:
    shape = draw(st.integers(1, 3)), 32 * draw(st.integers(1, 3))
    return draw(hnp.arrays(np.float32, shape, elements=finite, fill=finite))


@given(hnp.arrays(np.float32, 16, elements=st.floats(-9, 9, width=32)))
def test_numbers_and_codes_are_those_of_ml_dtypes(values: NDArray[np.float32]) -> None:
    want = np.clip(values, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(nearest(values), want.astype(np.float32))
    np.testing.assert_array_equal(encode(nearest(values)), want.view(np.uint8) & 15)


def test_halves_become_even_codes() -> None:
    halves = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -5], np.float32)
    assert nearest(halves).tolist() == [0, 1, 1, 2, 2, 4, 4, 0, -4]


@given(hnp.arrays(np.uint8, (3, 32), elements=st.integers(0, 15)))
def test_packed_codes_are_what_onnx_reads_back(codes: NDArray[np.uint8]) -> None:
    raw = pack_rows(codes, bits=4).tobytes()
    tensor = onnx.helper.make_tensor("t", onnx.TensorProto.FLOAT4E2M1, codes.shape, raw, raw=True)
    read = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    np.testing.assert_array_equal(read, codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    np.testing.assert_array_equal(read, e2m1.VALUES[codes])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FORMATS)
@given(matrix=matrices())
def test_values_are_those_of_codes_and_scales(name: str, method: str, matrix: NDArray[np.float32]) -> None:
    quantize, size, scale_type = FORMATS[name]
    made = quantize(matrix, method=method)
    assert made["blocks"].dtype == scale_type
    blocks = made["blocks"].astype(np.float32)
    assert np.isfinite(blocks).all() and (blocks > 0).all()
    codes = made["codes"].view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scale = np.repeat(blocks, size, axis=1)
    np.testing.assert_array_equal(made["values"], codes * scale * made.get("scales", 1))


@pytest.mark.parametrize("name", FORMATS)
@given(matrix=matrices())
def test_every_value_is_within_half_a_step_of_its_code(name: str, matrix: NDArray[np.float32]) -> None:
    """Steps are 0.5 to 2 of a block's scale; what is beyond 6 is clipped, by as much as the scale was rounded down."""
    quantize, size, _ = FORMATS[name]
    made = quantize(matrix, method="rtn")
    scale = np.repeat(made["blocks"].astype(np.float64), size, axis=1) * made.get("scales", 1)
    clipped = np.maximum(np.abs(matrix) - 6 * scale, 0)
    half = np.where(np.abs(matrix) < 2 * scale, 0.25, np.where(np.abs(matrix) < 4 * scale, 0.5, 1)) * scale
    assert (np.abs(made["values"] - matrix.astype(np.float64)) <= np.maximum(half * (1 + 1e-5), clipped * 1.01)).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tails", [3, 30])
def test_searched_scales_are_the_best_of_all_that_there_are(name: str, tails: int) -> None:
    """Squared errors of a scale that the format has, each tried, for weights with heavy tails and with light ones."""
    quantize, size, _ = FORMATS[name]
    matrix = np.random.default_rng(tails).standard_t(tails, (24, 96)).astype(np.float32)
    made = quantize(matrix, method="rtn-mse")
    groups: NDArray[np.float32] = (matrix / made.get("scales", np.float32(1))).reshape(len(matrix), -1, size)
    table = e2m1.E4M3[1:] if name == "nvfp4" else e2m1.E8M0[96:160]

    def squared_error(scale: NDArray[np.float32]) -> NDArray[np.float32]:
        error: NDArray[np.float32] = np.square(nearest(groups / scale) * scale - groups).sum(-1)
        return error

    tried = np.stack([squared_error(table[i : i + 1]) for i in range(len(table))])
    found = squared_error(made["blocks"].astype(np.float32)[..., None])
    np.testing.assert_allclose(found, np.min(tried, axis=0), rtol=1e-5)
    plain = np.square(quantize(matrix, method="rtn")["values"] - matrix).sum()
    assert np.square(made["values"] - matrix).sum() < 0.98 * plain


def test_mxfp4_scales_by_the_power_of_two_of_the_largest_magnitude() -> None:
    """The specification's rule, worked out by hand: 2^(floor(log2 7.5) - 2) = 1, so that 7.5 is clipped to 6."""
    matrix = np.zeros((1, 64), np.float32)
    matrix[0, :4] = [7.5, -3.0, 0.2, 0.3]
    matrix[0, 32:34] = [0.5, 0.07]  # 2^(-1 - 2) = 1/8: 4, and 0.56 becomes 0.5
    made = mxfp4(matrix, method="rtn")
    assert made["blocks"].astype(np.float32).tolist() == [[1.0, 0.125]]
    assert made["values"][0, [0, 1, 2, 3, 32, 33]].tolist() == [6, -3, 0, 0.5, 0.5, 0.0625]
    assert made["codes"][0, [0, 1, 2, 3, 32, 33]].tolist() == [7, 13, 0, 1, 6, 1]


def test_an_outputs_largest_block_has_the_scale_256() -> None:
    matrix = np.zeros((2, 32), np.float32)
    matrix[0, [0, 16]] = [0.6, 0.03]
    made = nvfp4(matrix, method="rtn")
    np.testing.assert_allclose(made["scales"], [[0.6 / (6 * 256)], [1.0]], rtol=1e-6)
    # 256 / 20 = 12.8, and e4m3 has 12 and 13. An output of zeros takes the smallest, which is positive.
    assert made["blocks"].astype(np.float32).tolist() == [[256, 13], [2.0**-9, 2.0**-9]]
    assert not made["codes"][1].any()


@pytest.mark.parametrize("quantize", [nvfp4, mxfp4])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(quantize: type, bad: float) -> None:
    matrix = np.zeros((2, 32), np.float32)
    matrix[1, 7] = bad
    with pytest.raises(InputError, match="infinite or NaN, which no FP4 code can stand for"):
        quantize(matrix, method="rtn")
