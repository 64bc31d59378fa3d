"""The custom ops' fallback bodies against the model's own leaves, in ONNX's reference evaluator and in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from corral.exporter.ops import CUSTOM_OPS, attention, moe
from corral.exporter.ops.custom_op import DOMAIN, OPSET, VERSION
from corral.model.text import ChunkedAttention, Experts, Rotary
from corral.spec.model_config import parse_config

Arrays = dict[str, np.ndarray]
Config = Callable[[str], dict[str, Any]]


def single_node_model(
    body: ir.Function, attributes: dict[str, Any], inputs: Arrays, ranks: list[int]
) -> onnx.ModelProto:
    """A graph of one call to `body`, all of whose inputs and outputs are the graph's."""
    op_type = body.name
    values = [onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
              for n, a in inputs.items()]  # fmt: skip
    names = [value.name or "" for value in body.outputs]
    outputs = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [f"{name}_{i}" for i in range(rank)])
        for name, rank in zip(names, ranks, strict=True)
    ]
    node = onnx.helper.make_node(op_type, list(inputs), names, domain=DOMAIN, **attributes)
    return onnx.helper.make_model(
        onnx.helper.make_graph([node], "one", values, outputs),
        functions=[ir.to_proto(body)],
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )


def run_everywhere(model: onnx.ModelProto, inputs: Arrays) -> list[list[np.ndarray]]:
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [onnx.reference.ReferenceEvaluator(model).run(None, inputs), session.run(None, inputs)]


@pytest.mark.parametrize("form", ["scout", "topk2"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5)])
def test_moe_body_equals_the_model(tiny_config: Config, form: str, shape: tuple[int, int]) -> None:
    config = parse_config(tiny_config(form))
    torch.manual_seed(1)
    leaf = Experts(config)
    torch.nn.init.normal_(leaf.gate_up_proj)
    torch.nn.init.normal_(leaf.down_proj)
    x = torch.randn(*shape, config.hidden_size)
    logits = torch.randn(*shape, config.num_local_experts)
    with torch.no_grad():
        want = leaf(x, logits).numpy()
    inputs = {"x": x.numpy(), "router_logits": logits.numpy()}
    inputs |= {"gate_up": leaf.gate_up_proj.detach().numpy(), "down": leaf.down_proj.detach().numpy()}
    (body,) = moe.bodies(config)
    model = single_node_model(body, {"k": config.num_experts_per_tok}, inputs, [3])
    for (got,) in run_everywhere(model, inputs):
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_moe_body_never_reads_an_expert_that_no_token_chose(tiny_config: Config) -> None:
    config = parse_config(tiny_config("scout"))
    torch.manual_seed(2)
    x, logits = torch.randn(4, config.hidden_size), torch.full((4, config.num_local_experts), -1.0)
    logits[:, 3] = 1.0
    weights = torch.full((config.num_local_experts, config.hidden_size, 2 * config.intermediate_size), torch.nan)
    down = torch.full((config.num_local_experts, config.intermediate_size, config.hidden_size), torch.nan)
    weights[3], down[3] = 0.1, 0.1
    inputs = {"x": x, "router_logits": logits, "gate_up": weights, "down": down}
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    (body,) = moe.bodies(config)
    for (got,) in run_everywhere(single_node_model(body, {"k": 1}, arrays, [2]), arrays):
        assert np.isfinite(got).all()


@pytest.mark.parametrize("form", ["scout", "maverick"])
@pytest.mark.parametrize("index", [0, 3])
def test_attention_body_equals_the_model(tiny_config: Config, form: str, index: int) -> None:
    """Rope (with and without qk norm) and nope (with temperature) layers, rows of a batch at different lengths."""
    config = parse_config(tiny_config(form))
    layer = config.layers[index]
    batch, tokens, capacity, dim = 2, 3, 12, config.head_dim
    torch.manual_seed(3)
    query = torch.randn(batch, tokens, config.query_size)
    key, value = torch.randn(2, batch, tokens, config.kv_size)
    past_key, past_value = torch.randn(2, batch, config.num_key_value_heads, capacity, dim)
    past_length = torch.tensor([0, 5])
    positions = past_length[:, None] + torch.arange(tokens)
    angle = positions[..., None].float() * torch.tensor(config.inverse_frequencies())
    rotary = Rotary(angle.cos(), angle.sin(), 1 + 0.1 * torch.rand(batch, tokens))
    core = ChunkedAttention(config, layer)
    want = core(query, key, value, rotary, positions, past_key, past_value, past_length)
    inputs = {"query": query, "key": key, "value": value}
    inputs |= {"past_key": past_key, "past_value": past_value, "past_length": past_length}
    attributes: dict[str, Any] = {
        "num_heads": config.num_attention_heads,
        "kv_num_heads": config.num_key_value_heads,
        "chunk_size": 0,
    }
    if layer.rope:
        inputs |= {"cos": rotary.cos_BSd, "sin": rotary.sin_BSd}
        attributes["qk_norm_epsilon"] = config.rms_norm_eps if config.use_qk_norm else 0.0
    else:
        assert rotary.temperature_BS is not None
        inputs |= {"temperature": rotary.temperature_BS}
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    name = attention.ROPE if layer.rope else attention.NOPE
    body = next(body for body in attention.bodies(config) if body.name == name)
    for got in run_everywhere(single_node_model(body, attributes, arrays, [3, 4, 4]), arrays):
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6 * theirs.abs().max().item(), rtol=0)


def test_every_leaf_of_the_model_has_one_op() -> None:
    assert [op.leaf for op in CUSTOM_OPS] == [ChunkedAttention, Experts]
