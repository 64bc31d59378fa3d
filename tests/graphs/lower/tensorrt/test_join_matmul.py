"""Products of one value joined into one: q, k and v, gate and up. That logits stay is in test_lowering.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from corral.graphs.quantize.pack import pack_columns, pack_signed_rows

TinyBundle = Callable[[str, str, str], Path]


def decoder(directory: Path) -> onnx.GraphProto:
    return onnx.load(directory / "decoder.onnx").graph


@pytest.mark.parametrize("weights", ["fp16", "int4", "fp8"])
@pytest.mark.parametrize(
    ("form", "dense"), [("scout", 0), ("maverick", 3), ("guard", 5)]
)  # layers whose feed-forward is dense
def test_three_and_two_products_become_one_each(tiny_bundle: TinyBundle, form: str, dense: int, weights: str) -> None:
    graph = decoder(tiny_bundle(form, "tensorrt-rtx", weights))
    ends = Counter(".".join(part for part in node.name.split(".") if not part.isdigit()) for node in graph.node)
    assert (
        ends["layers.self_attn.MatMul"] == ends["layers.self_attn.Split"] == ends["layers.self_attn.o_proj.MatMul"] == 5
    )
    assert ends["layers.feed_forward.MatMul"] == ends["layers.feed_forward.down_proj.MatMul"] == dense
    assert ends["layers.feed_forward.shared_expert.MatMul"] == 5 - dense
    assert not [name for name in ends if "q_proj.MatMul" in name or "up_proj.MatMul" in name]


def test_the_joined_matrix_holds_the_rows_of_q_then_k_then_v(tiny_bundle: TinyBundle) -> None:
    joined, apart = (
        {tensor.name: tensor for tensor in decoder(tiny_bundle("scout", target, weights)).initializer}
        for target, weights in (("tensorrt-rtx", "fp16"), ("portable", "fp32"))
    )
    names = [f"layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
    rows = np.concatenate([onnx.numpy_helper.to_array(apart[name]).T for name in names])
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(joined["+".join(names)]), rows.astype(np.float16))


def test_rows_and_columns_of_codes_are_the_same_numbers() -> None:
    codes = np.random.default_rng(0).integers(1, 16, (6, 4), np.uint8)
    signed = codes.astype(np.int8) - 8

    def unpacked(packed: np.ndarray) -> np.ndarray:
        nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).astype(np.int8)
        return np.where(nibbles > 7, nibbles - 16, nibbles)

    np.testing.assert_array_equal(unpacked(pack_signed_rows(codes, bits=4)), signed)
    np.testing.assert_array_equal(unpacked(pack_columns(codes, bits=4)), signed.T)
    np.testing.assert_array_equal(pack_signed_rows(codes, bits=8), codes.astype(np.int16) - 128)
