"""What every pass takes: a graph and the plan of its weights, which are rewritten side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from corral.exporter.capture import SCOPE
from corral.exporter.planned_tensor import planned_initializer
from corral.spec.model_config import ModelConfig
from corral.spec.recipe import Recipe
from corral.spec.weight_plan import Entry, WeightPlan


@dataclass
class ModelAndPlan:
    """A decoder graph, its weight plan, and what they are being made into."""

    model: ir.Model
    plan: WeightPlan
    config: ModelConfig
    recipe: Recipe
    statistics: str = ""  # the key of what the recipe's calibration text shows, where its method wants to know

    @property
    def graph(self) -> ir.Graph:
        return self.model.graph

    def entry_of(self, value: ir.Value | None) -> Entry | None:
        """The plan entry behind a value, or None where it is not a planned weight."""
        if value is None or value.name is None or not value.is_initializer():
            return None
        return self.plan.entries.get(value.name)

    def nodes(self, op_type: str, domain: str = "") -> Iterator[ir.Node]:
        """The graph's nodes of one kind; the graph may be changed while iterating."""
        return (node for node in list(self.graph) if node.op_type == op_type and node.domain == domain)

    def replace_weight(self, old: Entry, *new: Entry) -> list[ir.Value]:
        """Replace a planned weight by others, in plan and graph; the caller rewires its uses to the values returned."""
        self.plan.replace(old.name, *new)
        del self.graph.initializers[old.name]
        values = [planned_initializer(entry) for entry in new]
        for value in values:
            self.graph.register_initializer(value)
        return values

    def unlink(self, entry: Entry) -> None:
        """Take a planned weight from the nodes that read it, which nothing uses any more."""
        for use in list(self.graph.initializers[entry.name].uses()):
            use.node.replace_input_with(use.idx, None)

    def merge_weights(self, old: Sequence[Entry], joined: Entry) -> ir.Value:
        """Replace several planned weights by one, in plan and graph; the caller rewires their uses."""
        self.plan.replace(old[0].name, joined)
        for entry in old[1:]:
            self.plan.replace(entry.name)
        for entry in old:
            del self.graph.initializers[entry.name]
        value = planned_initializer(joined)
        self.graph.register_initializer(value)
        return value

    def replace_node(self, old: ir.Node, new: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> None:
        """Put `new` in `old`'s place, `outputs` for its outputs; they belong to the module that `old` came from."""
        for node in new:
            node.metadata_props[SCOPE] = old.metadata_props.get(SCOPE, "")
        ir.convenience.replace_nodes_and_values(self.graph, old, [old], new, old.outputs, outputs)

    def constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        """A small constant as an initializer, shared by name."""
        assert tensor.name is not None
        if tensor.name not in self.graph.initializers:
            value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), const_value=tensor)
            value.shape = ir.Shape(tensor.numpy().shape)
            self.graph.register_initializer(value)
        return self.graph.initializers[tensor.name]


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value, where it is of this kind."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


# A pass rewrites in place and says whether it changed anything. One that was promised a pattern and finds none raises.
Pass = Callable[[ModelAndPlan], bool]


class PatternAbsent(AssertionError):
    """A pass was promised a pattern that the graph does not have: a defect of corral, not of the user's input."""
