"""corral::MoE -> corral's own kernels, as plugins: of the experts' weights only what a token visits is read, as stored.

    expert, visit, gate, offset = corral::moe_route(router_logits)
    h = corral::moe_gate_up_int4(x, visit, gate, offset, codes, scales)
    y = corral::moe_down_int4(h, visit, offset, codes, scales)             summed over a token's visits

`graphs/engine/plugins/moe.py` is the table of plugins. A layer is lowered so where the target's module takes plugins, the
kernels can do its sizes and weights, and the recipe leaves `expert_tiles` open; any other becomes blocks of rows (`moe.py`).
Runs after `lower_precision`: what plugins read has the types that they read. FP8 is storage here: products are float16, and
activations are not rounded.

NOT EXECUTED by TensorRT. Tests run the lowered graph in ONNX's reference evaluator, its plugins by the CUDA sources on the
CPU.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from corral.exporter.ops.custom_op import DOMAIN, VERSION
from corral.exporter.ops.moe import NAME
from corral.graphs.engine.kernels.launch import MoeShape, buffers, refusal
from corral.graphs.engine.plugins.moe import NAMESPACE, PLUGINS
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent, made_by
from corral.graphs.quantize.float_weight import find_float
from corral.graphs.quantize.fragments import TILE_OUTPUTS
from corral.graphs.quantize.quantized_weight import find_quantized
from corral.spec.target import target_named
from corral.spec.tensorrt_flavors import FLAVORS
from corral.spec.weight_plan import Entry, Source, Step, step

PLUGIN = {plugin.name: plugin for plugin in PLUGINS}
# TensorRT's parser takes a node for a plugin by these attributes, whatever else has its name.
FOUND_BY = {"plugin_namespace": NAMESPACE, "plugin_version": "1"}


@dataclass(frozen=True)
class _Stored:
    """A fused weight of a layer's experts as the quantizer left it; `scales` are FP8's gains, too."""

    weights: str  # a name in launch.FORMATS, unless the kernels do not know it
    group_size: int
    codes: Entry
    scales: Entry | None


def plugins_cover(work: ModelAndPlan, node: ir.Node) -> bool:
    """Whether a corral::MoE is lowered to plugins."""
    module = target_named(work.recipe.target).engine
    if module is None or not FLAVORS[module].plugins or work.recipe.expert_tiles:
        return False
    return not any(refusal(_shape(work, _stored(work, weight))) for weight in node.inputs[2:4])


def lower_plugin_moe(work: ModelAndPlan) -> bool:
    """Lower every MoE layer that is left. Raises PatternAbsent for one that plugins do not cover."""
    nodes = list(work.nodes(NAME, DOMAIN))
    for node in nodes:
        if not plugins_cover(work, node):
            raise PatternAbsent(f"lower_plugin_moe found {node.name}, which no plugin covers")
        build = tape.Tape()
        y = _routed(build, work, node)
        work.replace_node(node, build.nodes, [y])
    if nodes:
        work.model.opset_imports[DOMAIN] = VERSION
    return bool(nodes)


def _routed(build: tape.Tape, work: ModelAndPlan, node: ir.Node) -> ir.Value:
    x, logits, *weights = node.inputs
    stored = [_stored(work, weight) for weight in weights]
    shapes = [_shape(work, experts) for experts in stored]
    hidden, top_k = shapes[0].hidden, shapes[0].top_k
    values = {
        "x": build.op("Reshape", [x, _ints(work, -1, hidden)]),
        "logits": build.op("Reshape", [_before_cast(logits), _ints(work, -1, shapes[0].experts)]),
    }
    for name, experts, shape in zip(("gate_up", "down"), stored, shapes, strict=True):
        values |= _store(work, name, experts, shape)
    calls = ("moe_route", f"moe_gate_up_{shapes[0].weights}", f"moe_down_{shapes[1].weights}")
    for name, shape in zip(calls, (shapes[0], *shapes), strict=True):
        plugin = PLUGIN[name]
        made = build.op_multi_out(
            name,
            [values[tensor] for tensor in plugin.tensors.inputs],
            {**{key: getattr(shape, key) for key in plugin.attributes}, **FOUND_BY},
            num_outputs=len(plugin.tensors.outputs),
            domain=DOMAIN,
        )
        values |= dict(zip(plugin.tensors.outputs, made, strict=True))
    y = values["y"]  # a row a visit
    if top_k > 1:
        by_token = build.op("Reshape", [y, _ints(work, -1, top_k, hidden)])
        y = build.op("ReduceSum", [by_token, _ints(work, 1)], {"keepdims": 0})
    return build.op("Reshape", [y, build.op("Shape", [x])])


def _stored(work: ModelAndPlan, weight: ir.Value | None) -> _Stored:
    quantized, number = find_quantized(work, weight), find_float(work, weight)
    if quantized is not None:
        return _Stored(f"int{quantized.bits}", quantized.group_size, quantized.codes, quantized.scales)
    if number is not None:
        return _Stored(work.recipe.of(number.codes.weight).weights, 0, number.codes, number.gains)
    entry = work.entry_of(weight)
    if entry is None:
        raise PatternAbsent(f"the experts' {weight.name if weight else 'weight'} is no planned weight")
    return _Stored("fp16", 0, entry, None)


def _shape(work: ModelAndPlan, experts: _Stored) -> MoeShape:
    config = work.config
    return MoeShape(
        hidden=config.hidden_size,
        width=config.intermediate_size,
        experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        weights=experts.weights,
        group_size=experts.group_size,
    )


def _store(work: ModelAndPlan, name: str, experts: _Stored, shape: MoeShape) -> dict[str, ir.Value]:
    """Store a weight in the kernels' layout; its initializers under the kernels' names for them."""
    layouts = [(".codes", experts.codes, step("pack_fragments", bits=shape.format.bits))]
    if experts.scales is not None and shape.format.scale_dtype:
        layouts.append((".scales", experts.scales, step("fragment_scales", dtype=shape.format.scale_dtype)))
    values = {}
    for part, entry, layout in layouts:
        dtype, extent = buffers(shape, 1)[name + part]
        work.unlink(entry)
        (values[name + part],) = work.replace_weight(
            entry,
            dataclasses.replace(
                entry,
                name=experts.codes.name if part == ".codes" else f"{experts.codes.name.removesuffix('.codes')}.scales",
                dtype="int8" if dtype == "uint8" else dtype,  # TensorRT's plugins know no unsigned bytes
                shape=extent,
                pieces=tuple(_in_runs(piece) for piece in entry.pieces) if name == "gate_up" else entry.pieces,
                steps=(*_quantizer(entry), layout),
                cut="rows",
                cut_multiple=TILE_OUTPUTS,
            ),
        )
    return values


def _in_runs(piece: Source) -> Source:
    """Eight outputs of gate, and the eight of up for the same units: a tile has both."""
    return dataclasses.replace(piece, interleave=TILE_OUTPUTS // 2)


def _quantizer(entry: Entry) -> tuple[Step, ...]:
    """The step that made codes and scales, without what only serves another layout; none where values are stored."""
    return tuple(step for step in entry.steps if step.output)


def _before_cast(value: ir.Value | None) -> ir.Value | None:
    """The router's own float32, not the 16 bits that `lower_precision` gives a node that it does not know."""
    cast = made_by(value, "Cast")
    return cast.inputs[0] if cast else value


def _ints(work: ModelAndPlan, *numbers: int) -> ir.Value:
    return work.constant(ir.tensor(np.array(numbers), name="list_" + "_".join(map(str, numbers))))
