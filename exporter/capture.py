"""The reference model on fake weights -> an ONNX graph of `spec/graph_io.py`'s contract, in seconds, at any size.

The model's two leaves are swapped for nodes of the `corral` domain; everything else becomes standard ONNX. Initializers
that are parameters of the model keep its parameter names and hold no data.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from corral.exporter.ops import CUSTOM_OPS
from corral.exporter.ops.custom_op import DOMAIN, OPSET
from corral.model.text import Llama4Text, Past
from corral.spec import graph_io
from corral.spec.model_config import ModelConfig

# torch.export specialises sizes of 0 and 1 and may tie equal ones: distinct, larger examples keep every axis dynamic.
EXAMPLE = {"batch": 2, "tokens": 3, "rows": 4, "chunked": 5, "global": 6}

SCOPE = "scope"  # a node's metadata: the module it came from


class _Decoder(nn.Module):
    """`Llama4Text` with its caches as flat arguments, in the order of the graph's inputs."""

    def __init__(self, model: Llama4Text) -> None:
        super().__init__()
        self.model = model

    def forward(self, embeddings: Tensor, positions: Tensor, logit_rows: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        config = self.model.config
        lengths = dict(zip(config.kv_classes, state, strict=False))
        caches = state[len(lengths) :]
        past = Past(keys=caches[0::2], values=caches[1::2], length_B=lengths)
        logits, keys, values = self.model(embeddings, positions, logit_rows, past)
        return (logits, *(cache for pair in zip(keys, values, strict=True) for cache in pair))


def capture(config: ModelConfig) -> ir.Model:
    """Export a decoder of shape `config`; takes seconds and a few hundred MB whatever the size of its weights."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _quiet():
        decoder = _Decoder(_with_nodes_for_leaves(Llama4Text(config).eval()))
        inputs, axes, input_names = _example_inputs(config)
        program = torch.onnx.export(
            decoder,
            inputs,
            dynamo=True,
            optimize=False,  # constant folding would need the weights
            opset_version=OPSET,
            dynamic_shapes=(*axes[:3], tuple(axes[3:])),
            input_names=input_names,
            output_names=_output_names(config),
            verbose=False,
        )
    assert program is not None
    model = program.model
    _tidy(model)
    for op in CUSTOM_OPS:
        for body in op.bodies(config):
            model.functions[body.identifier()] = body
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about packages that it does not find and axes that it renames: neither concerns a user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _with_nodes_for_leaves(model: Llama4Text) -> Llama4Text:
    node_of = {op.leaf: op.node for op in CUSTOM_OPS}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in node_of:
                setattr(parent, name, node_of[type(child)](child))
    return model


def _example_inputs(config: ModelConfig) -> tuple[tuple[Tensor, ...], list[dict[int, object]], list[str]]:
    size = EXAMPLE
    batch, tokens, rows = (torch.export.Dim.AUTO,) * 3
    inputs = [
        torch.zeros(size["batch"], size["tokens"], config.hidden_size),
        torch.zeros(size["batch"], size["tokens"], dtype=torch.int64),
        torch.zeros(size["batch"], size["rows"], dtype=torch.int64),
    ]
    axes: list[dict[int, object]] = [{0: batch, 1: tokens}, {0: batch, 1: tokens}, {0: batch, 1: rows}]
    names = [graph_io.EMBEDDINGS, graph_io.POSITIONS, graph_io.LOGIT_ROWS]
    for kv_class in config.kv_classes:
        inputs.append(torch.zeros(size["batch"], dtype=torch.int64))
        axes.append({0: batch})
        names.append(graph_io.past_length(kv_class))
    for i, layer in enumerate(config.layers):
        for name in (graph_io.past_key(i), graph_io.past_value(i)):
            shape = (size["batch"], config.num_key_value_heads, size[layer.kv_class], config.head_dim)
            inputs.append(torch.zeros(shape))
            axes.append({0: batch, 2: torch.export.Dim.AUTO})
            names.append(name)
    return tuple(inputs), axes, names


def _output_names(config: ModelConfig) -> list[str]:
    caches = [
        name for i in range(config.num_layers) for name in (graph_io.present_key(i), graph_io.present_value(i))
    ]  # fmt: skip
    return [graph_io.LOGITS, *caches]


def _tidy(model: ir.Model) -> None:
    """Drop what names this machine or this run, and give parameters, and axes their own names."""
    graph = model.graph
    model.producer_name, model.producer_version = "corral", None
    model.metadata_props.clear()
    graph.name = "decoder"
    for name in list(graph.initializers):
        value = graph.initializers[name]
        if name.startswith("model."):
            value.name = name.removeprefix("model.")
    for node in graph:
        scope = _scope(node)
        node.metadata_props.clear()
        node.metadata_props[SCOPE] = scope
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.shape = value.shape if value.is_graph_output() else None  # in the exporter's axis names
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    _name_axes(graph)


def _scope(node: ir.Node) -> str:
    """The module of the model that a node came from, as in "layers.3.self_attn.q_proj"; "" outside of any."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    modules = [scope.removeprefix("model.") for scope in scopes if scope.startswith("model.")]
    return modules[-1] if modules else ""


def _name_axes(graph: ir.Graph) -> None:
    """Inputs and outputs get readable symbolic axes: batch, tokens, rows, and one capacity per KV class."""
    capacity_of: dict[str, str] = {}
    for node in graph:
        if node.domain == DOMAIN and "chunk_size" in node.attributes:
            kv_class = "chunked" if node.attributes["chunk_size"].as_int() else "global"
            for value in (*node.inputs[3:5], *node.outputs[1:3]):
                assert value is not None and value.name
                capacity_of[value.name] = f"capacity_{kv_class}"
    for value in (*graph.inputs, *graph.outputs):
        assert value.name and value.shape is not None
        static = [d if isinstance(d, int) else None for d in value.shape]
        names = {
            graph_io.EMBEDDINGS: ("batch", "tokens"),
            graph_io.POSITIONS: ("batch", "tokens"),
            graph_io.LOGIT_ROWS: ("batch", "rows"),
            graph_io.LOGITS: ("batch", "rows"),
        }.get(value.name, ("batch", None, capacity_of.get(value.name)))
        dims = [names[i] if i < len(names) and names[i] else size for i, size in enumerate(static)]
        value.shape = ir.Shape(dims)
