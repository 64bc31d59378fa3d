"""Round to nearest and the storage layouts: bounds and round trips, property-based."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from corral.graphs.quantize.e4m3 import BASE, group_scales, output_scales
from corral.graphs.quantize.pack import pack_columns, pack_nibbles, pack_rows, pack_zero_rows, unpack_nibbles
from corral.graphs.quantize.rtn import rtn
from corral.graphs.quantize.tiles import tile_codes, tile_scales, tile_zeros
from corral.spec.errors import InputError

finite = st.floats(-(2.0**100), 2.0**100, width=32)


@st.composite
def weights(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    group = draw(st.sampled_from([32, 64, 128]))
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return draw(hnp.arrays(np.float32, (rows, groups * group), elements=finite, fill=finite)), group


@given(weights(), st.sampled_from([4, 8]))
def test_every_value_is_within_half_a_step_of_its_code(weight: tuple[np.ndarray, int], bits: int) -> None:
    matrix, group = weight
    stored = rtn(matrix, bits=bits, group_size=group)
    codes, scales = stored["codes"], stored["scales"]
    assert codes.dtype == np.uint8
    assert codes.min() >= 1
    assert codes.max() <= 2**bits - 1
    assert (scales > 0).all()
    step = np.repeat(scales.astype(np.float64), group, axis=1)
    values = (codes.astype(np.float64) - 2 ** (bits - 1)) * step
    assert (np.abs(values - matrix) <= step * (0.5 + 1e-5)).all()


@given(weights(), st.sampled_from([2, 3, 4]))
def test_every_value_is_within_a_step_of_its_asymmetric_code(weight: tuple[np.ndarray, int], bits: int) -> None:
    """Half a step of its own, and at the ends of the range another half, by which 0 was moved to a code."""
    matrix, group = weight
    stored = rtn(matrix, bits=bits, group_size=group, asymmetric=True)
    codes, scales, zeros = stored["codes"], stored["scales"], stored["zeros"]
    assert codes.dtype == zeros.dtype == np.uint8
    assert zeros.shape == scales.shape
    assert max(codes.max(), zeros.max()) <= 2**bits - 1
    assert (scales > 0).all()
    step = np.repeat(scales.astype(np.float64), group, axis=1)
    values = (codes.astype(np.float64) - np.repeat(zeros, group, axis=1)) * step
    assert (np.abs(values - matrix) <= step * (1 + 1e-5)).all()
    assert (values[matrix == 0] == 0).all()


def test_an_asymmetric_group_is_scaled_by_its_range() -> None:
    matrix = np.zeros((1, 128), np.float32)
    # A range of 15 steps; 2.7 of them below 0 become 3, the half rounds to even.
    matrix[0, :4] = [12.3, -2.7, 1.0, -0.5]
    matrix[0, 32:64] = np.linspace(1.5, 3.0, 32)  # from 0 on, though nothing is below 1.5
    matrix[0, 64:96] = -1.5
    stored = rtn(matrix, bits=4, group_size=32, asymmetric=True)
    np.testing.assert_allclose(stored["scales"], [[1.0, 0.2, 0.1, 1.0]], rtol=1e-6)
    assert stored["zeros"].tolist() == [[3, 0, 15, 8]]
    assert stored["codes"][0, :5].tolist() == [15, 0, 4, 3, 3]
    assert stored["codes"][0, 63] == 15
    assert (stored["codes"][0, 64:96] == 0).all()
    assert (stored["codes"][0, 96:] == 8).all()


def test_a_group_is_scaled_by_its_largest_magnitude_alone() -> None:
    matrix = np.zeros((1, 64), np.float32)
    matrix[0, :3] = [7.0, -3.5, 1.0]  # group one: scale 1; the 3.5 rounds to even
    matrix[0, 32:34] = [0.7, 0.1]
    stored = rtn(matrix, bits=4, group_size=32)
    np.testing.assert_allclose(stored["scales"], [[1.0, 0.1]], rtol=1e-6)
    assert stored["codes"][0, :4].tolist() == [15, 4, 9, 8]
    assert stored["codes"][0, 32:35].tolist() == [15, 9, 8]


@given(hnp.arrays(np.float32, (2, 3), elements=st.floats(2.0**-20, 2.0**10, width=32)))
def test_codes_of_w4a8_become_numbers_of_fp8(scales: np.ndarray) -> None:
    """The lowest code of an output's largest group becomes -448, and no code more; codes times both scales are values."""
    left, outputs = group_scales(scales), output_scales(scales)
    np.testing.assert_allclose(left / BASE * outputs, scales, rtol=1e-6)
    np.testing.assert_allclose((8 * left / BASE).max(axis=1), 448, rtol=1e-6)


def test_a_group_of_zeros_stays_zero() -> None:
    stored = rtn(np.zeros((2, 32), np.float32), bits=4, group_size=32)
    assert (stored["codes"] == 8).all()
    assert (stored["scales"] == 1).all()


EVEN_SHAPES = hnp.array_shapes(max_dims=3, max_side=6).map(lambda shape: (*shape[:-1], 2 * shape[-1]))


@given(hnp.arrays(np.uint8, EVEN_SHAPES, elements=st.integers(0, 15)))
def test_nibbles_round_trip(codes: np.ndarray) -> None:
    packed = pack_nibbles(codes)
    assert packed.shape[-1] * 2 == codes.shape[-1]
    np.testing.assert_array_equal(unpack_nibbles(packed), codes)


def test_the_first_code_is_in_the_low_nibble() -> None:
    assert pack_rows(np.array([[0x3, 0xA]], np.uint8), bits=4).tolist() == [[0xA3]]


@pytest.mark.parametrize(
    ("bits", "stored_type"), [(2, ml_dtypes.int4), (3, ml_dtypes.int4), (4, ml_dtypes.int4), (8, np.int8)]
)
@given(data=st.data())
def test_columns_are_what_onnx_reads_back(bits: int, stored_type: type, data: st.DataObject) -> None:
    """ONNX's own helper is the independent reader of INT4 and INT8 raw data."""
    codes = data.draw(hnp.arrays(np.uint8, (32, 6), elements=st.integers(1, 2**bits - 1)))
    raw = np.ascontiguousarray(pack_columns(codes, bits=bits)).tobytes()
    kind = onnx.TensorProto.INT8 if bits == 8 else onnx.TensorProto.INT4
    tensor = onnx.helper.make_tensor("w", kind, (6, 32), raw, raw=True)
    got = onnx.numpy_helper.to_array(tensor).astype(np.int64)
    np.testing.assert_array_equal(got, codes.T.astype(np.int64) - 2 ** (bits - 1))


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.integers(0, 15)))
def test_zero_points_fill_whole_bytes_of_each_row(zeros: np.ndarray) -> None:
    packed = pack_zero_rows(zeros)
    groups = zeros.shape[1]
    assert packed.shape == (len(zeros), (groups + 1) // 2)
    np.testing.assert_array_equal(unpack_nibbles(packed)[:, :groups], zeros)


@given(st.integers(1, 3), st.integers(1, 4), st.data())
def test_zero_points_of_a_tile_are_pairs_of_outputs(tiles: int, groups: int, data: st.DataObject) -> None:
    zeros = data.draw(hnp.arrays(np.uint8, (16 * tiles, groups), elements=st.integers(0, 15)))
    packed = tile_zeros(zeros)
    assert packed.shape == (tiles, groups, 8)
    for output in range(16 * tiles):
        nibbles = packed[output // 16, :, output % 8] >> (4 * (output % 16 // 8)) & 15
        np.testing.assert_array_equal(nibbles, zeros[output])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("output", "k"), [(0, 0), (15, 63), (16, 0), (31, 44), (7, 9), (20, 31), (20, 32)])
def test_a_tile_has_each_code_where_the_kernels_look_for_it(bits: int, output: int, k: int) -> None:
    """Bit by bit, as kernels/src/kernels.h says it; of one code that is not zero."""
    codes = np.zeros((32, 64), np.uint8)
    for bit in range(bits):
        codes[output, k] = 1 << bit
        tiles = tile_codes(codes, bits=bits)
        assert tiles.shape == (2, 2 * bits * 64)
        four, byte = k // 4, 4 * (output % 16) + k % 4
        if bits == 3 and bit == 2:
            where = (192 * (k // 32) + 128 + byte, four % 8)
        elif bits == 3:
            where = (192 * (k // 32) + 64 * (four % 8 // 4) + byte, 2 * (four % 4) + bit)
        else:
            where = (64 * (four * bits // 8) + byte, bits * (four % (8 // bits)) + bit)
        want = np.zeros_like(tiles)
        want[output // 16, where[0]] = 1 << where[1]
        np.testing.assert_array_equal(tiles, want)


def test_scales_of_a_tile_lie_group_by_group() -> None:
    scales = np.arange(32 * 3, dtype=np.float32).reshape(32, 3)
    tiles = tile_scales(scales)
    assert tiles.dtype == np.float16
    assert tiles.shape == (2, 3, 16)
    assert tiles[1, 2, 5] == scales[16 + 5, 2]


def test_a_scale_beyond_fp16_is_refused() -> None:
    with pytest.raises(InputError, match=r"scale 1e\+05; .* at most 65504. Compile with --kernels stock"):
        tile_scales(np.full((16, 1), 1e5, np.float32))
