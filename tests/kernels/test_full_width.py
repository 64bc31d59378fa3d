"""The last of 128 experts at the published models' full width: its codes begin more than 4 GiB into the tensor.

The file is sparse, so the test reads and writes one expert only, as the kernel must.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, save

from corral.kernels import find_library
from corral.spec.cpu_ops import DOMAIN

pytestmark = pytest.mark.usefixtures("cpu_kernels")

HIDDEN, WIDTH, GROUP = 5120, 8192, 128
SHAPES = {
    "gate_up": (2 * WIDTH // 16, 8 * HIDDEN),
    "gate_up_scales": (2 * WIDTH // 16, HIDDEN // GROUP, 16),
    "down": (HIDDEN // 16, 8 * WIDTH),
    "down_scales": (HIDDEN // 16, WIDTH // GROUP, 16),
}


def answer(directory: Path, experts: int, weights: dict[str, NDArray[Any]], x: NDArray[np.float32]) -> NDArray[Any]:
    """TiledExperts of so many experts, of which only the last is not zero, and which `x` is routed to."""
    directory.mkdir()
    initializers, offset = [], 0
    with (directory / "weights").open("wb") as file:
        for name, values in weights.items():
            tensor = TensorProto(name=name, dims=(experts, *values.shape), data_location=TensorProto.EXTERNAL)
            tensor.data_type = TensorProto.UINT8 if values.dtype == np.uint8 else TensorProto.FLOAT16
            place = {"location": "weights", "offset": offset, "length": experts * values.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            file.seek(offset + (experts - 1) * values.nbytes)
            file.write(values.tobytes())
            offset = -(-file.tell() // 4096) * 4096
            initializers.append(tensor)
    logits = np.zeros((len(x), experts), np.float32)
    logits[:, -1] = 1
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "logits")]
    node = helper.make_node(
        "TiledExperts", ["x", "logits", *weights], ["y"], domain=DOMAIN, k=1, gate_up_bits=4, down_bits=4
    )
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "experts", inputs, [output], initializers)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    save(helper.make_model(graph, opset_imports=imports, ir_version=10), directory / "graph.onnx")
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(find_library().path))
    session = ort.InferenceSession(directory / "graph.onnx", options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, "logits": logits})[0]


def test_an_expert_beyond_4_gib_answers_as_it_does_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weights: dict[str, NDArray[Any]] = {
        name: rng.integers(0, 256, shape, dtype=np.uint8)
        if len(shape) == 2
        else rng.uniform(0.001, 0.002, shape).astype(np.float16)
        for name, shape in SHAPES.items()
    }
    assert 127 * weights["gate_up"].nbytes > 4 << 30
    x = rng.standard_normal((1, HIDDEN)).astype(np.float32)
    alone = answer(tmp_path / "alone", 1, weights, x)
    assert np.abs(alone).max() > 0
    assert np.array_equal(answer(tmp_path / "last", 128, weights, x), alone)
