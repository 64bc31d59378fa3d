"""The operators against float64, against ONNX Runtime's own, against themselves in other batches, and against bad input.

Models of one node are built here; `true_*` say in float64 what they must compute.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from corral.graphs.quantize.pack import pack_rows
from corral.graphs.quantize.tiles import tile_codes, tile_scales, tile_zeros
from corral.kernels import find_library
from corral.spec.cpu_ops import DOMAIN

pytestmark = pytest.mark.usefixtures("cpu_kernels")

Array = NDArray[Any]
FLOAT = TensorProto.FLOAT
VARIABLE = "CORRAL_CPU_OPS_ISA"
LIBRARY = "CORRAL_TEST_LIBRARY"  # test_sanitizers.py runs this file again, with another build
EXAMPLES = 8 if LIBRARY in os.environ else 30


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix [outputs, inputs]: codes of 2, 3, 4 or 8 bits, scales [outputs, groups] that fp16 can hold, and
    where codes are asymmetric zero points of the scales' shape.
    """

    codes: Array
    scales: Array
    bits: int = 4
    zeros: Array | None = None

    @property
    def values(self) -> Array:
        """What it stands for, in float64."""
        group = self.codes.shape[1] // self.scales.shape[1]
        zeros = np.full(self.scales.shape, 1 << (self.bits - 1)) if self.zeros is None else self.zeros
        signed = self.codes.astype(np.float64) - np.repeat(zeros, group, axis=1)
        return signed * np.repeat(self.scales.astype(np.float64), group, axis=1)

    @property
    def stored(self) -> tuple[Array, Array]:
        return tile_codes(self.codes, bits=self.bits), tile_scales(self.scales)

    @property
    def stored_zeros(self) -> Array | None:
        return None if self.zeros is None else tile_zeros(self.zeros)


def random_matrix(
    rng: np.random.Generator, outputs: int, inputs: int, group: int, bits: int = 4, asymmetric: bool = False
) -> Matrix:
    codes = rng.integers(1, 1 << bits, (outputs, inputs), dtype=np.uint8)
    spread = 5 * 2.0 ** (bits - 4)
    scales = (rng.uniform(0.5, 1.5, (outputs, inputs // group)) / spread / np.sqrt(inputs)).astype(np.float16)
    zeros = rng.integers(0, 1 << bits, scales.shape, dtype=np.uint8) if asymmetric else None
    return Matrix(codes, scales.astype(np.float32), bits, zeros)


def quantized(weight: Array, group: int) -> Matrix:
    groups = weight.reshape(len(weight), -1, group)
    scales = (np.abs(groups).max(-1) / 7).astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint(groups / scales[:, :, None]), -7, 7) + 8
    return Matrix(codes.astype(np.uint8).reshape(weight.shape), scales)


def stacked(matrices: Sequence[Matrix]) -> tuple[Array, Array]:
    codes, scales = zip(*(matrix.stored for matrix in matrices), strict=True)
    return np.stack(codes), np.stack(scales)


def stacked_zeros(matrices: Sequence[Matrix]) -> Array | None:
    zeros = [matrix.stored_zeros for matrix in matrices]
    return None if zeros[0] is None else np.stack(zeros)  # type: ignore[arg-type]


def session(
    op: str,
    weights: Sequence[Array | None],
    activations: Sequence[str] = ("x",),
    *,
    domain: str = DOMAIN,
    threads: int = 1,
    inputs: Sequence[str] = (),
    types: dict[str, int] | None = None,
    **attributes: Any,
) -> ort.InferenceSession:
    """A session of one node: its weights are w0, w1, …, its `inputs` the activations and these unless said otherwise. A
    weight that is None is left out.
    """
    names = ["" if weight is None else f"w{i}" for i, weight in enumerate(weights)]
    node = helper.make_node(op, inputs or [*activations, *names], ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, (types or {}).get(name, FLOAT), None) for name in activations],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(array, name) for array, name in zip(weights, names, strict=True) if array is not None],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(os.environ.get(LIBRARY) or str(find_library().path))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


INSTRUCTION_SETS = ("portable", "avx2", "avx512_vnni")


def matmul(matrix: Matrix, x: Array, **options: Any) -> Array:
    weights = (*matrix.stored, matrix.stored_zeros)
    return session("TiledMatMul", weights, bits=matrix.bits, **options).run(None, {"x": x})[0]


def feed_forward(gate_up: Matrix, down: Matrix, x: Array, **options: Any) -> Array:
    bits: dict[str, Any] = {"gate_up_bits": gate_up.bits, "down_bits": down.bits}
    weights = (*gate_up.stored, *down.stored, gate_up.stored_zeros, down.stored_zeros)
    return session("TiledFeedForward", weights, **bits, **options).run(None, {"x": x})[0]


def experts(
    gate_up: Sequence[Matrix], down: Sequence[Matrix], x: Array, logits: Array, k: int = 1, **options: Any
) -> Array:
    weights = (*stacked(gate_up), *stacked(down), stacked_zeros(gate_up), stacked_zeros(down))
    bits: dict[str, Any] = {"gate_up_bits": gate_up[0].bits, "down_bits": down[0].bits}
    return session("TiledExperts", weights, ("x", "logits"), k=k, **bits, **options).run(
        None, {"x": x, "logits": logits}
    )[0]


def moe(
    gate_up: Sequence[Matrix],
    down: Sequence[Matrix],
    shared: tuple[Matrix, Matrix],
    x: Array,
    logits: Array,
    k: int,
    **options: Any,
) -> Array:
    zeros = [stacked_zeros(gate_up), stacked_zeros(down), *(matrix.stored_zeros for matrix in shared)]
    weights = (*stacked(gate_up), *stacked(down), *shared[0].stored, *shared[1].stored, *zeros)
    bits: dict[str, Any] = {"gate_up_bits": gate_up[0].bits, "down_bits": down[0].bits}
    bits |= {"shared_gate_up_bits": shared[0].bits, "shared_down_bits": shared[1].bits}
    return session("TiledMoE", weights, ("x", "logits"), k=k, **bits, **options).run(None, {"x": x, "logits": logits})[
        0
    ]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


Forced = Callable[[str], AbstractContextManager[None]]
See = Callable[[Array], Array]  # what a product makes of its activations before it multiplies


def true_feed_forward(gate_up: Matrix, down: Matrix, x: Array, see: See = np.asarray) -> Array:
    gate, up = np.split(see(x).astype(np.float64) @ gate_up.values.T, 2, axis=-1)
    return see(gate * sigmoid(gate) * up) @ down.values.T


def true_experts(
    gate_up: Sequence[Matrix], down: Sequence[Matrix], x: Array, logits: Array, k: int = 1, see: See = np.asarray
) -> Array:
    y = np.zeros(x.shape, np.float64)
    for token in range(len(x)):
        for e in np.argsort(-logits[token], kind="stable")[:k]:
            scaled = sigmoid(logits[token, e].astype(np.float64)) * x[token]
            y[token] += true_feed_forward(gate_up[e], down[e], scaled[None], see)[0]
    return y


def relative_error(got: Array, want: Array) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def rounded(x: Array, group: int) -> Array:
    """What int8 activations with a scale for each group make of x: the kernels' only approximation."""
    groups = x.reshape(*x.shape[:-1], -1, group)
    largest = np.abs(groups).max(-1, keepdims=True)
    codes = np.rint(groups * np.divide(np.float32(127), largest, where=largest > 0, out=np.zeros_like(largest)))
    return (codes.astype(np.float64) * (largest / np.float32(127))).reshape(x.shape)


def random_batch(rng: np.random.Generator, tokens: int, hidden: int, *, outliers: bool = False) -> Array:
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    if outliers:  # a few channels far above the others, as in real transformers
        x[:, rng.choice(hidden, 6, replace=False)] *= 20
    return x


# --- what is computed ---

SHAPES = st.tuples(
    st.integers(1, 30),  # tokens
    st.integers(1, 5),  # tiles of outputs
    st.integers(1, 4),  # groups of inputs
    st.sampled_from((32, 64, 128)),
    st.integers(0, 1000),  # seed
)
ALL_BITS = (2, 3, 4, 8)
# Bits, and whether there are zero points.
CODES_OF = tuple((bits, asymmetric) for bits in ALL_BITS for asymmetric in (False, True) if bits < 8 or not asymmetric)
CODES_OF_BOTH = st.tuples(st.sampled_from(CODES_OF), st.sampled_from(CODES_OF))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@given(shape=SHAPES, codes=st.sampled_from(CODES_OF))
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_matrix_product_is_that_of_the_rounded_activations(
    forced: Forced, instruction_set: str, shape: tuple[int, int, int, int, int], codes: tuple[int, bool]
) -> None:
    """Given int8 activations, only float32 sums over groups are inexact."""
    tokens, tiles, groups, group, seed = shape
    rng = np.random.default_rng(seed)
    matrix = random_matrix(rng, 16 * tiles, groups * group, group, *codes)
    x = random_batch(rng, tokens, groups * group)
    with forced(instruction_set):
        got = matmul(matrix, x)
    assert relative_error(got, rounded(x, group) @ matrix.values.T) < 1e-6


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize(("bits", "code"), [(bits, code) for bits in ALL_BITS for code in (0, 1, 2**bits - 1)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_codes_do_not_overflow(
    forced: Forced, instruction_set: str, bits: int, code: int, sign: int
) -> None:
    matrix = Matrix(np.full((16, 256), code, np.uint8), np.ones((16, 2), np.float32), bits)
    x = np.full((5, 256), sign * 127, np.float32)
    with forced(instruction_set):
        assert (matmul(matrix, x) == sign * 127 * 256 * (code - (1 << (bits - 1)))).all()
        for zero in (0, 2**bits - 1) if bits < 8 else ():
            asymmetric = dataclasses.replace(matrix, zeros=np.full((16, 2), zero, np.uint8))
            assert (matmul(asymmetric, x) == sign * 127 * 256 * (code - zero)).all()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@given(shape=SHAPES, experts_and_k=st.sampled_from(((1, 1), (4, 1), (5, 2), (3, 3))), codes=CODES_OF_BOTH)
@settings(max_examples=EXAMPLES, deadline=None)
def test_experts_and_feed_forward_compute_their_definition(
    forced: Forced,
    instruction_set: str,
    shape: tuple[int, int, int, int, int],
    experts_and_k: tuple[int, int],
    codes: tuple[tuple[int, bool], tuple[int, bool]],
) -> None:
    """With activations rounded to int8: where one is nearly between two codes it may become the other."""
    tokens, tiles, groups, group, seed = shape
    count, k = experts_and_k
    rng = np.random.default_rng(seed)
    hidden, width = groups * group, tiles * 128
    gate_up = [random_matrix(rng, 2 * width, hidden, group, *codes[0]) for _ in range(count)]
    down = [random_matrix(rng, hidden, width, group, *codes[1]) for _ in range(count)]
    x, logits = random_batch(rng, tokens, hidden), rng.standard_normal((tokens, count)).astype(np.float32)
    with forced(instruction_set):
        routed = experts(gate_up, down, x, logits, k)
        dense = feed_forward(gate_up[0], down[0], x)
    see = functools.partial(rounded, group=group)
    assert relative_error(routed, true_experts(gate_up, down, x, logits, k, see)) < 3e-3
    assert relative_error(dense, true_feed_forward(gate_up[0], down[0], x, see)) < 3e-3


@pytest.mark.parametrize("k", [1, 3])
def test_experts_are_those_of_the_rounded_activations(k: int) -> None:
    """For most tokens exactly: a value on the border of two codes takes the other one now and then."""
    rng = np.random.default_rng(12)
    gate_up = [random_matrix(rng, 2 * 64, 128, 32) for _ in range(4)]
    down = [random_matrix(rng, 128, 64, 32) for _ in range(4)]
    x, logits = random_batch(rng, 41, 128), rng.standard_normal((41, 4)).astype(np.float32)
    want = true_experts(gate_up, down, x, logits, k, functools.partial(rounded, group=32))
    errors = np.abs(experts(gate_up, down, x, logits, k) - want).max(-1) / np.abs(want).max()
    assert np.median(errors) < 1e-6


@given(x=st.lists(st.floats(-120, 120, width=32), min_size=16, max_size=16))
@settings(max_examples=EXAMPLES, deadline=None)
def test_silu_is_exact_to_float32(x: list[float]) -> None:
    """Through matrices that pass single values: gate = x, up = 1, down = identity."""
    gate_up_codes = np.full((64, 32), 8, np.uint8)
    gate_up_codes[np.arange(16), np.arange(16)] = 9
    gate_up_codes[32:48, 16] = 9
    identity = np.full((32, 32), 8, np.uint8)
    identity[np.arange(32), np.arange(32)] = 9
    ones = np.ones((64, 1), np.float32)
    one_value = np.zeros((16, 32), np.float32)  # each row has one value besides the 1, so that rounding is seen once
    one_value[np.arange(16), np.arange(16)] = x
    one_value[:, 16] = np.abs(x)
    got = feed_forward(Matrix(gate_up_codes, ones), Matrix(identity, ones[:32]), one_value)
    value = np.array(x, np.float32).astype(np.float64)
    want = value * sigmoid(value) * np.abs(value)
    assert np.abs(np.diag(got) - want).max() <= 4e-6 * np.abs(want).max() + 1e-30


# --- against ONNX Runtime's own ---


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("group", [32, 128])
def test_error_is_no_larger_than_onnxruntimes(group: int, outliers: bool) -> None:
    """On the same data, at its accuracy level 4, which rounds activations to int8, too; 2 % for luck."""
    rng = np.random.default_rng(3)
    hidden, width, count, tokens = 512, 1024, 4, 37
    gate_up = [quantized(rng.standard_normal((2 * width, hidden)) / hidden**0.5, group) for _ in range(count)]
    down = [quantized(rng.standard_normal((hidden, width)) / width**0.5, group) for _ in range(count)]
    x = random_batch(rng, tokens, hidden, outliers=outliers)
    logits = rng.standard_normal((tokens, count)).astype(np.float32)
    want = true_experts(gate_up, down, x, logits)
    ours = relative_error(experts(gate_up, down, x, logits), want)
    scaled = x * sigmoid(logits.max(-1, keepdims=True))
    assert ours <= 1.02 * relative_error(qmoe(gate_up, down, scaled, logits, group), want)

    want = x.astype(np.float64) @ down[0].values[:, :hidden].T
    square = Matrix(down[0].codes[:, :hidden], down[0].scales[:, : hidden // group])
    assert relative_error(matmul(square, x), want) <= 1.02 * relative_error(matmul_nbits(square, x, group), want)


def qmoe(gate_up: Sequence[Matrix], down: Sequence[Matrix], x: Array, logits: Array, group: int) -> Array:
    def interleaved(array: Array) -> Array:
        return np.stack(np.split(array, 2), axis=1).reshape(array.shape)

    weights = (
        np.stack([interleaved(pack_rows(matrix.codes, bits=4)) for matrix in gate_up]),
        np.stack([interleaved(matrix.scales) for matrix in gate_up]),
        np.stack([pack_rows(matrix.codes, bits=4) for matrix in down]),
        np.stack([matrix.scales for matrix in down]),
    )
    attributes: dict[str, Any] = {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
    }
    attributes |= {"swiglu_limit": 1e30, "k": 1, "normalize_routing_weights": 1}
    attributes |= {"expert_weight_bits": 4, "block_size": group, "accuracy_level": 4}
    names = ("x", "logits", "w0", "w1", "", "w2", "w3", "")
    return session("QMoE", weights, ("x", "logits"), domain="com.microsoft", inputs=names, **attributes).run(
        None, {"x": x.astype(np.float32), "logits": logits}
    )[0]


def matmul_nbits(matrix: Matrix, x: Array, group: int) -> Array:
    outputs, inputs = matrix.codes.shape
    weights = (pack_rows(matrix.codes, bits=4).reshape(outputs, inputs // group, group // 2), matrix.scales)
    attributes = {"K": inputs, "N": outputs, "bits": 4, "block_size": group, "accuracy_level": 4}
    return session("MatMulNBits", weights, domain="com.microsoft", **attributes).run(None, {"x": x})[0]


# --- the same bits ---


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("k", [1, 2])
def test_shared_and_routed_experts_at_once_are_the_sum_of_both(tokens: int, k: int) -> None:
    rng = np.random.default_rng(tokens)
    gate_up, down = (
        [random_matrix(rng, 64, 32, 32) for _ in range(4)],
        [random_matrix(rng, 32, 32, 32) for _ in range(4)],
    )
    shared = random_matrix(rng, 128, 32, 32, 8), random_matrix(rng, 32, 64, 32, 3, True)
    x, logits = random_batch(rng, tokens, 32), rng.standard_normal((tokens, 4)).astype(np.float32)
    want = feed_forward(*shared, x)
    for choice in np.argsort(-logits, axis=-1)[:, :k].T:  # added one by one, as a token's order of choices says
        alone = np.full_like(logits, -np.inf)
        np.put_along_axis(alone, choice[:, None], np.take_along_axis(logits, choice[:, None], -1), -1)
        want = want + experts(gate_up, down, x, alone, 1)
    np.testing.assert_array_equal(moe(gate_up, down, shared, x, logits, k), want)


def test_a_shared_expert_of_another_width_of_tokens_is_refused() -> None:
    rng = np.random.default_rng(0)
    experts_of = [random_matrix(rng, 64, 32, 32)], [random_matrix(rng, 32, 32, 32)]
    shared = random_matrix(rng, 64, 64, 32), random_matrix(rng, 64, 32, 32)
    with pytest.raises(Exception, match="the shared expert takes 64 inputs, the others 32"):
        moe(*experts_of, shared, np.zeros((1, 32), np.float32), np.zeros((1, 1), np.float32), 1)


@pytest.mark.parametrize("codes", CODES_OF)
def test_bits_depend_neither_on_batch_nor_threads_nor_instruction_set(forced: Forced, codes: tuple[int, bool]) -> None:
    rng = np.random.default_rng(5)
    gate_up = [random_matrix(rng, 2 * 160, 96, 32, *codes) for _ in range(6)]
    down = [random_matrix(rng, 96, 160, 32, *codes) for _ in range(6)]
    x, logits = random_batch(rng, 67, 96), rng.standard_normal((67, 6)).astype(np.float32)
    assert len(set(logits.argmax(-1))) == 6

    def everything(rows: slice, threads: int = 1) -> tuple[Array, ...]:
        return (
            matmul(gate_up[0], x[rows], threads=threads),
            feed_forward(gate_up[0], down[0], x[rows], threads=threads),
            experts(gate_up, down, x[rows], logits[rows], 1, threads=threads),
            experts(gate_up, down, x[rows], logits[rows], 3, threads=threads),
            moe(gate_up, down, (gate_up[5], down[4]), x[rows], logits[rows], 1, threads=threads),
        )

    want = everything(slice(None))
    for threads in (2, 5):
        assert all(map(np.array_equal, everything(slice(None), threads), want))
    for rows in (slice(0, 1), slice(7, 20), slice(3, 5), slice(40, 67)):
        assert all(np.array_equal(got, all_[rows]) for got, all_ in zip(everything(rows), want, strict=True))
    for instruction_set in INSTRUCTION_SETS:
        with forced(instruction_set):
            assert all(map(np.array_equal, everything(slice(None)), want))


def test_more_tokens_than_are_computed_at_once() -> None:
    rng = np.random.default_rng(8)
    gate_up, down = [random_matrix(rng, 64, 32, 32)], [random_matrix(rng, 32, 32, 32)]
    x = random_batch(rng, 2048 + 5, 32)
    got = experts(gate_up, down, x, np.zeros((len(x), 1), np.float32))
    assert np.array_equal(got[2040:], experts(gate_up, down, x[2040:], np.zeros((13, 1), np.float32)))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (2, 3, 64), (64,)])
def test_leading_axes_are_as_given(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(9)
    x = rng.standard_normal(shape).astype(np.float32)
    gate_up, down = random_matrix(rng, 128, 64, 64), random_matrix(rng, 64, 64, 64)
    assert matmul(gate_up, x).shape == (*shape[:-1], 128)
    assert feed_forward(gate_up, down, x).shape == shape
    assert experts([gate_up], [down], x, np.zeros((*shape[:-1], 1), np.float32)).shape == shape


# --- bad input ---

RNG = np.random.default_rng(0)
GATE_UP, DOWN = random_matrix(RNG, 64, 64, 32), random_matrix(RNG, 64, 32, 32)
CODES, SCALES = GATE_UP.stored  # [4, 512], [4, 2, 16]
X = RNG.standard_normal((3, 64)).astype(np.float32)


@pytest.mark.parametrize(
    ("codes", "scales", "says"),
    [
        (CODES[:, :-8], SCALES, "8 bytes of codes for each input"),
        (CODES[:2], SCALES, "as many tiles"),
        (CODES, SCALES[:, :, :8], "16 scales for each group"),
        (CODES, SCALES[:, 0], "codes [tiles, bytes] and scales [tiles, groups, 16]"),
        (CODES[None], SCALES[None], "codes [tiles, bytes] and scales [tiles, groups, 16]"),
        (CODES[:, :384], np.repeat(SCALES, 3, axis=1)[:, :3], "32, 64 or 128 inputs in a group"),
        (CODES[:0], SCALES[:0], "at least one"),
        (CODES[:, :0], SCALES, "8 bytes of codes"),
        (CODES, SCALES[:, :0], "16 scales"),
    ],
)
def test_weights_that_do_not_fit_are_refused_when_the_session_opens(codes: Array, scales: Array, says: str) -> None:
    with pytest.raises(Exception, match="TiledMatMul: the matrix") as refused:
        session("TiledMatMul", (codes, scales), bits=4)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("zeros", "bits"),
    [
        (np.zeros((4, 2, 16), np.uint8), 4),
        (np.zeros((4, 1, 8), np.uint8), 4),
        (np.zeros((4, 2, 8), np.float16), 4),
        (np.zeros((4, 1, 8), np.uint8), 8),
    ],
)
def test_zero_points_that_do_not_fit_are_refused(zeros: Array, bits: int) -> None:
    scales = SCALES if bits == 4 else SCALES[:, :1]
    says = "TiledMatMul: the matrix: zero points .* codes of at most 4 bits|Type .* is invalid"
    with pytest.raises(Exception, match=says):
        session("TiledMatMul", (CODES, scales, zeros), bits=bits)


@pytest.mark.parametrize("bits", [-4, 0, 1, 5, 16])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(Exception, match=f"TiledMatMul: bits is {bits}, expected 2, 3, 4 or 8"):
        session("TiledMatMul", (CODES, SCALES), bits=bits)


def test_gate_up_and_down_must_fit_each_other() -> None:
    with pytest.raises(Exception, match="expected down to take half of gate_up's outputs"):
        feed_forward(GATE_UP, GATE_UP, X)
    with pytest.raises(Exception, match="expected down to take half of gate_up's outputs"):
        experts([GATE_UP] * 3, [DOWN] * 2, X, np.zeros((3, 3), np.float32))


@pytest.mark.parametrize("k", [0, -1, 3, 1 << 62])
def test_k_must_be_one_to_the_number_of_experts(k: int) -> None:
    with pytest.raises(Exception, match=f"k is {k}, expected 1 to the number of experts, 2"):
        experts([GATE_UP] * 2, [DOWN] * 2, X, np.zeros((3, 2), np.float32), k)


def test_activations_that_do_not_fit_are_refused() -> None:
    with pytest.raises(Exception, match=r"x has shape \[3, 63\], expected float values \[\.\.\., 64\]"):
        matmul(GATE_UP, X[:, :63])
    with pytest.raises(Exception, match=r"x has shape \[\]"):
        matmul(GATE_UP, np.array(1, np.float32))
    with pytest.raises(
        Exception, match=r"router_logits has shape \[2, 2\], expected a row for each of the 3 rows of x"
    ):
        experts([GATE_UP] * 2, [DOWN] * 2, X, np.zeros((2, 2), np.float32))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 31, 63])
def test_what_is_not_finite_is_refused(forced: Forced, instruction_set: str, value: float, place: int) -> None:
    x = X.copy()
    x[1, place] = value
    with forced(instruction_set):
        for run in (lambda: matmul(GATE_UP, x), lambda: feed_forward(GATE_UP, DOWN, x)):
            with pytest.raises(Exception, match="x holds a value that is infinite or not a number"):
                run()


def test_what_overflows_inside_is_refused() -> None:
    with pytest.raises(Exception, match="what gate and up made of x holds a value"):
        feed_forward(GATE_UP, DOWN, X * np.float32(1e36))


def test_a_router_logit_must_be_a_number() -> None:
    with pytest.raises(Exception, match="a router logit is not a number"):
        experts([GATE_UP] * 2, [DOWN] * 2, X, np.array([[0, 1], [np.nan, 0], [0, 1]], np.float32))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-40, 1e-36, 3e38])
def test_tiny_and_huge_values_are_no_trouble(value: float) -> None:
    x = np.full((2, 64), value, np.float32)
    got = matmul(Matrix(np.full((16, 64), 9, np.uint8), np.full((16, 2), 1 / 128, np.float32)), x)
    assert np.allclose(got, x.astype(np.float64).sum(-1, keepdims=True) / 128, rtol=0.01, atol=1e-34)


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "abacus")
    with pytest.raises(Exception, match=r'CORRAL_CPU_OPS_ISA is "abacus"; this processor has kernels for .*portable'):
        matmul(GATE_UP, X)


def test_weights_must_be_constant() -> None:
    with pytest.raises(Exception, match="input 1 is no constant initializer"):
        session("TiledMatMul", (SCALES,), ("x", "w"), inputs=("x", "w", "w0"), types={"w": TensorProto.UINT8}, bits=4)


@pytest.mark.skipif(sys.platform != "linux" or LIBRARY in os.environ, reason="limits this process's memory")
def test_too_little_memory_is_an_error_and_nothing_is_lost() -> None:
    import resource

    rng = np.random.default_rng(0)
    width = 1 << 16  # 2,000 tokens' inner values: 524 MB, more than malloc can have kept from the tests before
    gate_up, down = random_matrix(rng, 2 * width, 128, 128), random_matrix(rng, 128, width, 128)
    opened = session("TiledFeedForward", (*gate_up.stored, *down.stored), gate_up_bits=4, down_bits=4)
    x = random_batch(rng, 2000, 128)
    want = opened.run(None, {"x": x[:5]})[0]
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + (20 << 20), limits[1]))
    try:
        with pytest.raises(Exception, match="failed to allocate memory for the activations"):
            opened.run(None, {"x": x})
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert np.array_equal(opened.run(None, {"x": x[:5]})[0], want)
