"""What one stage of a bundle takes and gives, by name: the part of `spec.graph_io` that its range of layers has."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from corral.spec import graph_io
from corral.spec.bundle import Bundle
from corral.spec.errors import InputError
from corral.spec.manifest import GraphRecord
from corral.spec.model_config import KvClass, ModelConfig


@dataclass(frozen=True)
class StageIo:
    """The names of one stage's inputs and outputs."""

    layers: range
    kv_classes: frozenset[KvClass]
    first: bool
    last: bool

    @property
    def source(self) -> str:
        """Embeddings, or what the stage before gave."""
        return graph_io.EMBEDDINGS if self.first else graph_io.HIDDEN

    @property
    def result(self) -> str:
        return graph_io.LOGITS if self.last else graph_io.NEXT_HIDDEN

    @property
    def inputs(self) -> set[str]:
        names = {self.source, graph_io.POSITIONS} | ({graph_io.LOGIT_ROWS} if self.last else set())
        names |= {graph_io.past_length(kv_class) for kv_class in self.kv_classes}
        return names | {name(i) for i in self.layers for name in (graph_io.past_key, graph_io.past_value)}

    @property
    def outputs(self) -> set[str]:
        return {self.result} | {name(i) for i in self.layers for name in (graph_io.present_key, graph_io.present_value)}

    def check(self, where: str, inputs: Collection[str], outputs: Collection[str]) -> None:
        """Raise InputError unless the file `where` has just these inputs and outputs."""
        for kind, expected, found in (("inputs", self.inputs, set(inputs)), ("outputs", self.outputs, set(outputs))):
            if expected != found:
                raise InputError(
                    f"{where} has other {kind} than its manifest implies: lacks {sorted(expected - found)}, "
                    f"has also {sorted(found - expected)}. Compile the checkpoint again."
                )


def stage_io(model: ModelConfig, record: GraphRecord) -> StageIo:
    """Of one graph of a model."""
    layers = range(record.first_layer, record.end_layer)
    classes = frozenset(model.layers[i].kv_class for i in layers)
    return StageIo(layers, classes, record.first_layer == 0, record.end_layer == model.num_layers)


def check_stages(bundle: Bundle) -> None:
    """Raise InputError unless a bundle's graphs are all layers of its model, in order."""
    graphs, layers = bundle.manifest.graphs, bundle.manifest.model.num_layers
    edges = [0, *(graph.end_layer for graph in graphs)]
    follow = [graph.first_layer for graph in graphs] == edges[:-1] and edges == sorted(set(edges))
    if follow and edges[-1] == layers:
        return
    ranges = ", ".join(f"{graph.first_layer}-{graph.end_layer}" for graph in graphs) or "none"
    raise InputError(
        f"{bundle.directory} has graphs for layers {ranges}; expected ranges that follow each other from 0 to "
        f"{layers}. Compile the checkpoint again."
    )
