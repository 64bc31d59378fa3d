"""The experts' kernels as ahead-of-time plugins of TensorRT: `corral::moe_route`, `corral::moe_gate_up_int4`, …

    expert, visit, gate, offset = moe_route(logits)                             attributes: experts, top_k
    h = moe_gate_up_int4(x, visit, gate, offset, codes, scales)                 attributes: hidden, width, experts,
    y = moe_down_int4(h, visit, offset, codes, scales)                            top_k, group_size

One plugin per kernel and weight format (`_int4`, `_fp8`, `_fp16`; the last has no scales), each with two tactics, which
TensorRT times: decode's tiling and prefill's. Tensors are matrices [tokens, …]; codes are passed as int8, byte for byte.
With more than one expert a token, y has a row a visit, and the graph sums them. `graphs/lower/tensorrt/plugin_moe.py`
writes such nodes.

NOT EXECUTED: TensorRT proper needs a GPU to build. The declarations are checked against the Python sources of its 11.4
bindings (`tensorrt.plugin`), the kernels as docs/kernels.md says.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import GenericAlias, ModuleType
from typing import Any

from corral.graphs.engine.kernels.compile import compile_kernel
from corral.graphs.engine.kernels.launch import (
    DECODE,
    FORMATS,
    TILINGS,
    Launch,
    MoeShape,
    Tiling,
    buffers,
    check,
    product,
    route,
)
from corral.spec.errors import EnvironmentProblem

NAMESPACE = "corral"
ROUTE_ATTRIBUTES = ("experts", "top_k")
PRODUCT_ATTRIBUTES = ("hidden", "width", "experts", "top_k", "group_size")
TENSORRT_TYPE = {"float16": "FP16", "float32": "FP32", "int32": "INT32", "uint8": "INT8"}
# Custom tactics are numbered from 1.
TACTICS = dict(enumerate(TILINGS, start=1))


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One plugin: how it is called, and the launch it makes of symbolic tokens."""

    name: str
    weights: str
    attributes: tuple[str, ...]
    tactics: tuple[int, ...]  # none: the default one
    launch: Callable[[MoeShape, Any, Tiling, Callable[[Any, int], Any]], Launch]

    def shape(self, values: dict[str, int]) -> MoeShape:
        """What the attributes say. Where one is not asked for, the least that is allowed."""
        return MoeShape(**{"hidden": 64, "width": 64, "group_size": 0, "weights": self.weights, **values})  # type: ignore[arg-type]

    @property
    def tensors(self) -> Launch:
        """A launch of this plugin, for the names of its inputs and outputs."""
        return self.launch(self.shape(dict.fromkeys(ROUTE_ATTRIBUTES, 8)), 1, DECODE, min)


def _plugins() -> Iterator[Plugin]:
    yield Plugin(
        name="moe_route",
        weights="fp16",  # it reads none
        attributes=ROUTE_ATTRIBUTES,
        tactics=(),
        launch=lambda shape, tokens, tiling, least: route(shape, tokens),
    )
    for entry in ("moe_gate_up", "moe_down"):
        for weights in FORMATS:
            yield Plugin(
                name=f"{entry}_{weights}",
                weights=weights,
                attributes=PRODUCT_ATTRIBUTES,
                tactics=tuple(TACTICS),
                launch=functools.partial(product, entry),
            )


PLUGINS = tuple(_plugins())


def register_plugins(tensorrt: ModuleType, architecture: str) -> None:
    """Register every plugin with the module `tensorrt`, compiled for an architecture such as "compute_90a" when it is used.

    Raises EnvironmentProblem where the module has no ahead-of-time plugins (TensorRT for RTX), and ValueError, which is
    TensorRT's own, where they are registered already.
    """
    if not hasattr(tensorrt, "QuickPluginCreationRequest"):
        raise EnvironmentProblem(
            f"{tensorrt.__name__} {getattr(tensorrt, '__version__', '')} takes no plugins that are compiled ahead of time; "
            "TensorRT 11 does. Use a target without plugins."
        )
    importlib.import_module(f"{tensorrt.__name__}.plugin")
    for plugin in PLUGINS:
        _register(tensorrt, plugin, architecture)


def _register(trt: Any, plugin: Plugin, architecture: str) -> None:
    trtp = trt.plugin
    tensors = plugin.tensors
    names = [name.rpartition(".")[2] for name in tensors.inputs]

    def shape_of(values: tuple[Any, ...], given: dict[str, int]) -> MoeShape:
        """What the attributes say, which come after the tensors, or by name."""
        shape = plugin.shape({**dict(zip(plugin.attributes, values[len(names) :], strict=False)), **given})
        check(shape)
        return shape

    def tokens_of(values: tuple[Any, ...], shape: MoeShape) -> Any:
        rows = values[0].shape_expr[0]
        return rows // shape.top_k if names[0] == "h" else rows  # h has a row a visit

    def describe(*values: Any, **given: int) -> tuple[Any, ...]:
        shape = shape_of(values, given)
        table = buffers(shape, tokens_of(values, shape))
        made = []
        for dtype, extent in (table[name] for name in tensors.outputs):
            made.append(trtp.TensorDesc(trtp.ShapeExprs.from_tuple(extent), dtype=getattr(trt, dtype)))
        return tuple(made)

    def tune(*values: Any, **given: int) -> list[Any]:
        table = buffers(shape_of(values, given), 1)
        types = ", ".join(TENSORRT_TYPE[table[name][0]] for name in (*tensors.inputs, *tensors.outputs))
        return [trtp.AutoTuneCombination(types, "LINEAR", plugin.tactics)]

    def implement(*values: Any) -> tuple[str, bytes, Any, Any]:
        shape = shape_of(values[:-2], {})
        tiling = TACTICS.get(values[-1], DECODE)
        launch = plugin.launch(shape, tokens_of(values, shape), tiling, trtp.min)
        compiled = compile_kernel(launch.kernel, architecture, "ptx")
        x, y, z = launch.grid
        parameters = trtp.KernelLaunchParams(grid_x=x, grid_y=y, grid_z=z, block_x=launch.threads)
        sizes = trtp.SymIntExprs.from_tuple([trtp.SymInt32(size) for size in launch.sizes])
        return compiled.entry, compiled.image, parameters, sizes

    identity = f"{NAMESPACE}::{plugin.name}"
    inputs = dict.fromkeys(names, trtp.TensorDesc) | dict.fromkeys(plugin.attributes, int)
    outputs = {"outputs": GenericAlias(tuple, (trtp.TensorDesc,))}
    described = GenericAlias(tuple, (trtp.TensorDesc,) * len(tensors.outputs))
    tuned = GenericAlias(list, (trtp.AutoTuneCombination,))
    implemented = GenericAlias(tuple, (str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs))
    trtp.register(identity)(_signed(describe, inputs, described))
    if plugin.tactics:
        trtp.autotune(identity)(_signed(tune, inputs | outputs, tuned))
    trtp.aot_impl(identity)(_signed(implement, inputs | outputs | {"tactic": int}, implemented))


def _signed(function: Callable[..., Any], parameters: dict[str, Any], returns: Any) -> Callable[..., Any]:
    """TensorRT reads a plugin's inputs and attributes off its functions' signatures."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()],
        return_annotation=returns,
    )
    return function
