"""The plugins, declared to TensorRT's own Python code (its bindings' `plugin` package) on stand-ins for its native classes.

What is checked is what that code checks and passes on: signatures, types, shapes, grids, kernel arguments and PTX. That
TensorRT's builder takes them, and that the kernels run, is not.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from corral.graphs import compile
from corral.graphs.engine.kernels.launch import DECODE, PREFILL, MoeShape, launches
from corral.graphs.engine.plugins.moe import PLUGINS, register_plugins
from corral.spec.errors import EnvironmentProblem, InputError
from corral.spec.recipe import Recipe

SCOUT = {"hidden": 5120, "width": 8192, "experts": 16, "top_k": 1, "group_size": 128}
Input = tuple[Any, tuple[int, ...]]  # type and extent
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "SUM": lambda a, b: a + b,
    "SUB": lambda a, b: a - b,
    "PROD": lambda a, b: a * b,
    "MAX": max,
    "MIN": min,
    "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
}


class Native:
    """A native base class: takes any arguments."""

    def __init__(self, *arguments: Any) -> None:
        pass


class Expression(Native):
    """A symbolic dimension; its value when it comes to run."""

    def __init__(self, value: int) -> None:
        self.value = value


class Builder:
    """Of expressions."""

    def constant(self, value: int) -> Expression:
        return Expression(value)

    def operation(self, operation: enum.Enum, a: Expression, b: Expression) -> Expression:
        return Expression(OPERATIONS[operation.name](a.value, b.value))


class Exprs(list[Any]):
    """`trt.DimsExprs`."""

    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class DynamicDesc(Native):
    """A tensor while its kernel is chosen: type, layout and number of dimensions."""

    def __init__(self, dtype: enum.Enum, dims: tuple[int, ...], layout: enum.Enum) -> None:
        self.desc = SimpleNamespace(dims=dims, type=dtype, format=layout, scale=1.0)


class FormatDesc(Native):
    type: Any = None
    format: Any = None


@dataclass(frozen=True)
class Field:
    """`trt.PluginField`: an attribute, as the ONNX parser hands it over or as a creator declares it."""

    name: str
    data: Any
    type: Any


class LaunchParams(Native):
    """What TensorRT keeps of a launch."""


class Extra(dict[int, Any]):
    nbSymExprs = 0


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`tensorrt` with the bindings' own `plugin` package, and stand-ins for the rest."""
    found = importlib.util.find_spec("tensorrt_bindings")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package tensorrt-cu13-bindings is not installed")
    native = (
        "IPluginV3",
        "IPluginV3QuickCore",
        "IPluginV3QuickBuild",
        "IPluginV3QuickRuntime",
        "IPluginV3QuickAOTBuild",
    )
    module: Any = ModuleType("tensorrt")
    for name in (
        *native,
        "IPluginCreatorV3Quick",
        "ISymExpr",
        "ITensor",
        "IExprBuilder",
        "Dims",
    ):
        setattr(module, name, type(name, (Native,), {}))
    module.Dims.MAX_DIMS = 8
    module.PluginField, module.PluginFieldCollection = Field, list
    module.IDimensionExpr, module.DimsExprs = Expression, Exprs
    module.DynamicPluginTensorDesc, module.PluginTensorDesc = DynamicDesc, FormatDesc
    module.Logger = type("Logger", (Native,), {"WARNING": 1, "log": lambda self, *words: None})
    for name, members in {
        "DataType": "FLOAT HALF INT8 INT32",
        "TensorFormat": "LINEAR",
        "DimensionOperation": " ".join(OPERATIONS),
        "PluginFieldType": "INT8 INT16 INT32 INT64 FLOAT16 FLOAT32 FLOAT64 CHAR UNKNOWN",
        "PluginArgType": "INT",
        "PluginArgDataType": "INT8 INT16 INT32",
        "QuickPluginCreationRequest": "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT",
    }.items():
        setattr(module, name, enum.Enum(name, members))
    module.float32, module.float16 = module.DataType.FLOAT, module.DataType.HALF
    module.int8, module.int32 = module.DataType.INT8, module.DataType.INT32
    creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(creator: Any, namespace: str) -> bool:
        return creators.setdefault((creator.name, creator.plugin_version, namespace), creator) is creator

    registry = SimpleNamespace(register_creator=register_creator, get_creator=lambda *name: creators.get(name))
    module.get_plugin_registry = lambda: registry
    module.__path__ = list(found.submodule_search_locations)
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    yield module
    for name in set(sys.modules) - before:
        if name.startswith("tensorrt."):
            del sys.modules[name]


def built(tensorrt: Any, name: str, attributes: dict[str, int]) -> Any:
    """The object that TensorRT's builder would talk to."""
    library = importlib.import_module("tensorrt.plugin._lib")
    plugin_class = importlib.import_module("tensorrt.plugin._plugin_class")._TemplateAOTPlugin
    definition = library.QDP_REGISTRY[f"corral::{name}"]
    plugin = plugin_class(name, "corral", definition.num_outputs)
    plugin.init(
        definition.register_func,
        attributes,
        definition.aot_impl_attr_names,
        definition.aot_impl_func,
        definition.autotune_attr_names or [],
        definition.autotune_func,
    )
    return plugin


def run_builder(
    tensorrt: Any, plugin: Any, inputs: list[Input], tactic: int
) -> tuple[list[tuple[int, ...]], dict[str, int], list[int], str, bytes]:
    """The calls of a build in their order: output shapes, launch, kernel arguments, entry and PTX of one tactic."""
    types = [dtype for dtype, _ in inputs]
    output_types = plugin.get_output_data_types(types, [len(extent) for _, extent in inputs])
    symbolic = [[Expression(size) for size in extent] for _, extent in inputs]
    output_exprs = plugin.get_output_shapes(symbolic, [], Builder())
    output_shapes = [tuple(expression.value for expression in exprs) for exprs in output_exprs]
    linear = tensorrt.TensorFormat.LINEAR
    every = [DynamicDesc(dtype, extent, linear) for dtype, extent in inputs]
    every += [DynamicDesc(dtype, extent, linear) for dtype, extent in zip(output_types, output_shapes, strict=True)]
    formats = plugin.get_supported_format_combinations(every, len(inputs))
    assert [desc.type for desc in formats] == [*types, *output_types], "types and layouts as given"
    plugin.configure_plugin(every[: len(inputs)], every[len(inputs) :])
    assert sorted(plugin.get_valid_tactics()) == ([1, 2] if tactic else [])
    plugin.set_tactic(tactic)
    launched: Any = LaunchParams()
    extra = Extra()
    plugin.get_launch_params(symbolic, every, len(inputs), launched, extra, Builder())
    fields = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
    numbers = {name: getattr(launched, name).expr.value for name in fields}
    arguments = [extra[i].expr.value for i in range(extra.nbSymExprs)]
    entry, ptx = plugin.get_kernel([d.desc for d in every[: len(inputs)]], [d.desc for d in every[len(inputs) :]])
    return output_shapes, numbers, arguments, entry, ptx


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (70, 2)])
@pytest.mark.parametrize("weights", ["int4", "fp8", "fp16"])
def test_a_build_gets_the_launches_of_the_plan(weights: str, top_k: int, tokens: int, tensorrt: Any) -> None:
    register_plugins(tensorrt, "compute_90a")
    half, single, whole, byte = tensorrt.float16, tensorrt.float32, tensorrt.int32, tensorrt.int8
    attributes = {**SCOUT, "top_k": top_k, "group_size": 128 * (weights == "int4")}
    shape = MoeShape(weights=weights, **attributes)
    visits = tokens * top_k
    scale: dict[str, Any] = {"int4": half, "fp8": single}
    stored: list[Input] = [(half if weights == "fp16" else byte, (16, 1024, 80, 512))]
    stored += [(scale[weights], (16, 1024, 40, 8, 2))] if weights in scale else []
    tables: list[Input] = [(whole, (visits,)), (single, (visits,)), (whole, (17,))]
    calls: dict[str, tuple[list[Input], list[tuple[int, ...]]]] = {
        "moe_route": ([(single, (tokens, 16))], [(visits,), (visits,), (visits,), (17,)]),
        f"moe_gate_up_{weights}": ([(half, (tokens, 5120)), *tables, *stored], [(visits, 8192)]),
        f"moe_down_{weights}": ([(half, (visits, 8192)), tables[0], tables[2], *stored], [(visits, 5120)]),
    }
    for tactic, tiling in {1: DECODE, 2: PREFILL}.items():
        for (name, (inputs, outputs)), launch in zip(calls.items(), launches(shape, tokens, tiling), strict=True):
            own = {"experts": 16, "top_k": top_k} if name == "moe_route" else attributes
            plugin = built(tensorrt, name, own)
            made = run_builder(tensorrt, plugin, inputs, 0 if name == "moe_route" else tactic)
            output_shapes, numbers, arguments, entry, ptx = made
            assert output_shapes == outputs
            assert (numbers["grid_x"], numbers["grid_y"], numbers["grid_z"]) == launch.grid
            assert (numbers["block_x"], numbers["block_y"], numbers["block_z"]) == (launch.threads, 1, 1)
            assert numbers["shared_mem"] == 0
            assert tuple(arguments) == launch.sizes
            assert entry == launch.kernel.entry
            assert b".target sm_90a" in ptx


@pytest.fixture(params=["int4", "fp8", "fp16"])
def lowered_graph(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Any:
    """A small model lowered for `tensorrt`. Ask for it before `tensorrt`, whose stand-in torch would look into."""
    recipe = Recipe(target="tensorrt", weights=request.param, group_size=32, calibration_tokens=1024)
    compile(tiny_checkpoint("topk2"), tmp_path / "out", recipe)
    return onnx.load(tmp_path / "out" / "decoder.onnx", load_external_data=False).graph


def test_a_lowered_graph_calls_the_plugins_as_they_are_declared(lowered_graph: Any, tensorrt: Any) -> None:
    """Each node as TensorRT's ONNX parser takes it: found by name, version and namespace; of its attributes those that the
    creator declares; its weights' types and shapes."""
    register_plugins(tensorrt, "compute_80")
    types = {
        onnx.TensorProto.FLOAT: tensorrt.float32,
        onnx.TensorProto.FLOAT16: tensorrt.float16,
        onnx.TensorProto.INT8: tensorrt.int8,
    }
    known: dict[str, Input] = {t.name: (types.get(t.data_type), tuple(t.dims)) for t in lowered_graph.initializer}
    calls = [node for node in lowered_graph.node if node.domain == "corral"][:3]
    tokens, visits = 5, 10
    known |= {calls[0].input[0]: (tensorrt.float32, (tokens, 8)), calls[1].input[0]: (tensorrt.float16, (tokens, 64))}
    for node in calls:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        name = node.op_type, attributes["plugin_version"].decode(), attributes["plugin_namespace"].decode()
        creator = tensorrt.get_plugin_registry().get_creator(*name)
        assert {field.type.name for field in creator.field_names} == {"INT64"}
        fields = [Field(f.name, np.array([attributes.pop(f.name)]), f.type) for f in creator.field_names]
        assert attributes.keys() == {"plugin_version", "plugin_namespace"}
        request = tensorrt.QuickPluginCreationRequest.UNKNOWN  # as where the network says nothing
        plugin = creator.create_plugin(node.op_type, "corral", fields, None, request)
        inputs = [known[name] for name in node.input]
        shapes, *_ = run_builder(tensorrt, plugin, inputs, 0 if node.op_type == "moe_route" else 1)
        made = plugin.get_output_data_types([dtype for dtype, _ in inputs], [len(extent) for _, extent in inputs])
        known |= dict(zip(node.output, zip(made, shapes, strict=True), strict=True))
    assert known[calls[1].output[0]] == (tensorrt.float16, (visits, 64))
    assert known[calls[2].output[0]] == (tensorrt.float16, (visits, 64))


def test_every_plugin_is_registered_once(tensorrt: Any) -> None:
    register_plugins(tensorrt, "compute_80")
    registered = importlib.import_module("tensorrt.plugin._lib").QDP_REGISTRY
    assert set(registered) == {f"corral::{plugin.name}" for plugin in PLUGINS}
    assert len(PLUGINS) == 7
    with pytest.raises(ValueError, match="already has a defintion"):
        register_plugins(tensorrt, "compute_80")


def test_sizes_the_kernels_cannot_do_stop_the_build(tensorrt: Any) -> None:
    register_plugins(tensorrt, "compute_80")
    plugin = built(tensorrt, "moe_down_int4", {**SCOUT, "width": 100})
    with pytest.raises(InputError, match="expert width 100"):
        plugin.get_output_data_types([tensorrt.float16] * 5, [2, 1, 1, 5, 5])


def test_a_module_without_plugins_is_refused() -> None:
    module = ModuleType("tensorrt_rtx")
    module.__dict__["__version__"] = "1.7"
    with pytest.raises(EnvironmentProblem, match=r"tensorrt_rtx 1\.7 takes no plugins"):
        register_plugins(module, "compute_89")


def test_the_bindings_are_the_version_that_the_docstring_names() -> None:
    from importlib import metadata

    import corral.graphs.engine.plugins.moe as plugins

    assert metadata.version("tensorrt-cu13-bindings").startswith("11.4.")
    assert "11.4\nbindings" in (plugins.__doc__ or "")
    assert Path(plugins.__file__).name == "moe.py"
