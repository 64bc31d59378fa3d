"""A lowered decoder -> one graph for each range of layers, balanced by the bytes of their weights.

    embeddings -> [layers 0 … a-1] -> hidden -> [layers a … b-1] -> hidden -> … -> logits

Between two layers exactly one value passes that is not made of positions: the residual stream. What is made of positions
(rotation angles, temperature) is cheap, and every stage that needs it computes it anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from corral.exporter.bind_weights import EMBEDDING_ENTRY
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent
from corral.graphs.out_directory import GRAPH_FILE, stage_file
from corral.model.checkpoint.names import EMBEDDING
from corral.spec import graph_io
from corral.spec.errors import InputError
from corral.spec.layer_ranges import Range, balanced_ranges, fitting_ranges
from corral.spec.weight_plan import Placement, WeightPlan

LAYER = re.compile(r"layers\.(\d+)(\.|$)")


@dataclass(frozen=True)
class StageGraph:
    """One stage: its file in the bundle, its half-open range of layers, its graph."""

    path: str
    layers: Range
    model: ir.Model
    first_weight: str  # in the order they are stored


def split_stages(work: ModelAndPlan) -> list[StageGraph]:
    """Cut as the recipe says; one stage is the graph itself. The plan's entries are then in the stages' order.

    Raises InputError for more stages than layers, and for a layer that is larger than the recipe's limit.
    """
    ranges = stage_ranges(work)
    if len(ranges) == 1:
        return [whole_graph(work)]
    borders = [None, *(_border(work.graph, end) for _, end in ranges[:-1]), None]
    models = [_extract(work, *part) for part in zip(ranges, borders, borders[1:], strict=False)]
    _order_plan(work, models)
    return [
        StageGraph(stage_file(i), layers, model, _first_weight(work, model))
        for i, (layers, model) in enumerate(zip(ranges, models, strict=True))
    ]


def whole_graph(work: ModelAndPlan) -> StageGraph:
    """The decoder as its only stage."""
    return StageGraph(GRAPH_FILE, (0, work.config.num_layers), work.model, _first_weight(work, work.model))


def place_weights(work: ModelAndPlan, graphs: Sequence[StageGraph]) -> dict[str, Placement]:
    """Where every weight lies, by entry name: no shard holds two stages' weights, or the embedding beside others."""
    return work.plan.placements(starts={EMBEDDING_ENTRY, *(graph.first_weight for graph in graphs)})


def stage_ranges(work: ModelAndPlan) -> list[Range]:
    """The ranges of layers that the recipe asks for."""
    sizes, wanted, limit = _layer_bytes(work), work.recipe.stages, work.recipe.stage_gb * 10**9
    if wanted > len(sizes):
        raise InputError(
            f"{wanted} stages were asked for, but the model has {len(sizes)} layers; expected at most that."
        )
    if limit:
        fitting = fitting_ranges(sizes, limit)
        if fitting is None:
            raise InputError(
                f"the largest layer (the last one holds the head, too) has {max(sizes) / 1e9:.1f} GB of weights, more "
                f"than the {work.recipe.stage_gb} GB a stage may have. Raise --stage-gb, or compress the weights more."
            )
        wanted = max(wanted, len(fitting))
    return balanced_ranges(sizes, wanted)


def _layer_bytes(work: ModelAndPlan) -> list[int]:
    """Bytes of each layer's weights; what comes after the layers counts to the last one."""
    sizes = [0] * work.config.num_layers
    for entry in work.plan:
        if entry.weight != EMBEDDING:
            layer = _layer(entry.weight)
            sizes[-1 if layer is None else layer] += entry.nbytes
    return sizes


def _layer(name: str) -> int | None:
    match = LAYER.match(name)
    return int(match[1]) if match else None


def _border(graph: ir.Graph, layer: int) -> ir.Value:
    """The value that passes from the layers before `layer` to those from it on; nodes carry their layer in their name."""

    def before(node: ir.Node) -> bool:
        of = _layer(node.name or "")
        return of is not None and of < layer

    made = _made_of(next(value for value in graph.inputs if value.name == graph_io.EMBEDDINGS))
    passing = {
        value
        for node in graph
        if before(node)
        for value in node.outputs
        if value in made and not all(before(use.node) for use in value.uses())
    }
    if len(passing) != 1:
        names = ", ".join(sorted(str(value.name) for value in passing)) or "nothing"
        raise PatternAbsent(f"{names} passes into layer {layer}; expected the residual stream alone")
    return passing.pop()


def _made_of(value: ir.Value) -> set[ir.Value]:
    """All values that are computed of `value`, directly or not."""
    made, new = {value}, [value]
    while new:
        outputs = {output for use in new.pop().uses() for output in use.node.outputs} - made
        made |= outputs
        new.extend(outputs)
    return made


def _extract(work: ModelAndPlan, layers: Range, before: ir.Value | None, after: ir.Value | None) -> ir.Model:
    mine = range(*layers)
    classes = {work.config.layers[i].kv_class for i in mine}
    foreign = {
        *(name(i) for i in range(work.config.num_layers) if i not in mine for name in _CACHES),
        *(graph_io.past_length(kv_class) for kv_class in work.config.kv_classes if kv_class not in classes),
        *((graph_io.EMBEDDINGS,) if before else ()),
        *((graph_io.LOGIT_ROWS, graph_io.LOGITS) if after else ()),
    }
    inputs = _replaced(work.graph.inputs, foreign, before)
    outputs = _replaced(work.graph.outputs, foreign, after)
    graph = ir.convenience.extract(work.graph, inputs, outputs)
    if before:
        _name_hidden(graph.inputs[0], graph_io.HIDDEN, work.config.hidden_size)
    if after:
        _name_hidden(graph.outputs[0], graph_io.NEXT_HIDDEN, work.config.hidden_size)
    called = {node.op_identifier() for node in graph}
    functions = [body for identifier, body in work.model.functions.items() if identifier in called]
    model = ir.Model(graph, ir_version=work.model.ir_version, producer_name=work.model.producer_name)
    for body in functions:
        model.functions[body.identifier()] = body.clone()
    return model


_CACHES = (graph_io.past_key, graph_io.past_value, graph_io.present_key, graph_io.present_value)


def _replaced(values: Iterable[ir.Value], foreign: set[str], border: ir.Value | None) -> list[ir.Value]:
    """`values` without what is foreign to the stage, and its border first."""
    return [*((border,) if border else ()), *(value for value in values if value.name not in foreign)]


def _name_hidden(value: ir.Value, name: str, hidden_size: int) -> None:
    value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    value.shape = ir.Shape(["batch", "tokens", hidden_size])


def _order_plan(work: ModelAndPlan, models: list[ir.Model]) -> None:
    """Entries stage by stage, so that none shares a shard with another's; the embedding, which is no stage's, last."""
    stage_of = {name: i for i, model in enumerate(models) for name in model.graph.initializers}
    order = sorted(work.plan, key=lambda entry: stage_of.get(entry.name, len(models)))
    work.plan = WeightPlan({entry.name: entry for entry in order})


def _first_weight(work: ModelAndPlan, model: ir.Model) -> str:
    return next(entry.name for entry in work.plan if entry.name in model.graph.initializers)
