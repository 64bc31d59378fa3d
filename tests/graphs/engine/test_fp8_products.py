"""FP8 that falls back to float within the builder: small graphs, sound and broken, built for real."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from corral.graphs.engine.build import EngineSettings, build_engine
from corral.graphs.engine.fp8_products import fp8_products
from corral.graphs.engine.profiles import Profile
from corral.spec.errors import CheckFailed

pytest.importorskip("tensorrt_rtx")

INPUTS, OUTPUTS = 256, 512
PROFILES = (
    Profile(name="decode", axes={"blocks": (1, 1, 8), "rows": (1, 1, 1)}),
    Profile(name="prefill", axes={"blocks": (1, 16, 32), "rows": (1, 64, 64)}),
)
SETTINGS = EngineSettings(module="tensorrt_rtx", capabilities=("8.9",), profiles=PROFILES)
Node = tuple[str, list[str], str]  # operator, inputs, output
ROUND_X: list[Node] = [
    ("QuantizeLinear", ["x", "x_scale", "zero"], "x8"),
    ("DequantizeLinear", ["x8", "x_scale"], "xd"),
]
WEIGHT: list[Node] = [("DequantizeLinear", ["codes", "base"], "w"), ("Transpose", ["w"], "wt")]
SOUND: list[Node] = [*ROUND_X, *WEIGHT, ("MatMul", ["xd", "wt"], "sum"), ("Mul", ["sum", "gains"], "y")]
NO_ROUNDING: list[Node] = [*WEIGHT, ("MatMul", ["x", "wt"], "sum"), ("Mul", ["sum", "gains"], "y")]
EARLY_GAINS: list[Node] = [*ROUND_X, *WEIGHT, ("Mul", ["wt", "gains"], "wg"), ("MatMul", ["xd", "wg"], "y")]
BETWEEN: list[Node] = [*ROUND_X, ("Add", ["xd", "one"], "x1"), *WEIGHT, ("MatMul", ["x1", "wt"], "y")]


def save(nodes: Sequence[Node], path: Path) -> onnx.ModelProto:
    """A product of x [blocks, rows, 256] in float16 with an FP8 matrix."""
    float8 = TensorProto.FLOAT8E4M3FN
    codes = np.random.default_rng(0).standard_normal((OUTPUTS, INPUTS)) * 100
    data = codes.astype(ml_dtypes.float8_e4m3fn).tobytes()
    half = {"x_scale": 0.02, "base": 2.0**-12, "one": 1.0, "gains": np.full(OUTPUTS, 0.5)}
    initializers = [
        helper.make_tensor("codes", float8, codes.shape, data, raw=True),
        helper.make_tensor("zero", float8, (), b"\0", raw=True),
        *(numpy_helper.from_array(np.array(value, np.float16), name) for name, value in half.items()),
    ]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["blocks", "rows", width])
        for name, width in (("x", INPUTS), ("y", OUTPUTS))
    )
    made = [helper.make_node(op, inputs, [out], name=f"proj.{op}.{out}") for op, inputs, out in nodes]
    used = {name for node in made for name in node.input}
    graph = helper.make_graph(made, "g", [x], [y], [tensor for tensor in initializers if tensor.name in used])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    (path.parent / "w.bin").unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=True, location="w.bin")
    return model


def test_products_are_found_behind_whatever_stands_between(tmp_path: Path) -> None:
    for nodes in (SOUND, NO_ROUNDING, EARLY_GAINS, BETWEEN):
        graph = save(nodes, tmp_path / "g.onnx").graph
        assert fp8_products(graph) == tuple(node.name for node in graph.node if node.op_type == "MatMul")
    weights_in_half = [("MatMul", ["x", "one"], "y")]
    assert fp8_products(save(weights_in_half, tmp_path / "g.onnx").graph) == ()


def test_scales_in_fp8_are_no_fp8_matrix() -> None:
    """NVFP4's are dequantized to scale codes, which is all that a product sees of them."""
    float4, float8 = TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN
    initializers = [
        helper.make_tensor("codes", float4, (32, 32), bytes(512), raw=True),
        helper.make_tensor("blocks", float8, (32, 2), bytes(64), raw=True),
    ]
    nodes = [("DequantizeLinear", ["blocks", "base"], "scales"), ("DequantizeLinear", ["codes", "scales"], "w")]
    made = [helper.make_node(op, inputs, [out]) for op, inputs, out in nodes]
    graph = helper.make_graph([*made, helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [], [], initializers)
    assert fp8_products(graph) == ()


def test_int4_that_is_rounded_to_fp8_is_an_fp8_matrix() -> None:
    nodes = [("DequantizeLinear", ["codes", "groups"], "w4"), ("QuantizeLinear", ["w4", "base", "zero"], "w8")]
    nodes += [("DequantizeLinear", ["w8", "base"], "w")]
    made = [helper.make_node(op, inputs, [out]) for op, inputs, out in nodes]
    product = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    codes = helper.make_tensor("codes", TensorProto.INT4, (32, 32), bytes(512), raw=True)
    assert fp8_products(helper.make_graph([*made, product], "g", [], [], [codes])) == ("product",)


def test_fp8_in_both_operands_passes(tmp_path: Path) -> None:
    save(SOUND, tmp_path / "g.onnx")
    engine = build_engine(tmp_path / "g.onnx", "g.engine", SETTINGS)
    for schedule in engine.schedules:
        (product,) = (kernel for kernel in schedule.kernels if any("MatMul" in layer for layer in kernel.layers))
        assert [operand.type for operand in product.reads].count("fp8_e4m3") == 2


@pytest.mark.parametrize("nodes", [NO_ROUNDING, EARLY_GAINS, BETWEEN])
def test_a_silent_fallback_to_float_is_refused_and_the_engine_not_kept(tmp_path: Path, nodes: list[Node]) -> None:
    save(nodes, tmp_path / "g.onnx")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckFailed, match=r"multiplies proj\.MatMul\.\w+ of fp8_e4m3, half, expected two"):
        build_engine(tmp_path / "g.onnx", "g.engine", SETTINGS)
    assert sorted(tmp_path.iterdir()) == before
