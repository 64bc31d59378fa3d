"""A bundle's graphs for people: how many nodes of which operator, by domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from corral.cli.tables import Table, print_table
from corral.spec.bundle import Bundle
from corral.spec.errors import InputError

STANDARD = "ai.onnx"  # what the empty domain means


def graph_view(bundle: Bundle) -> tuple[Any, Callable[[], None]]:
    """Operator counts of every graph (and of the bodies of its functions), as JSON and as a function that prints them."""
    import onnx

    data: list[dict[str, Any]] = []
    for record in bundle.manifest.graphs:
        path = bundle.path(record.path)
        try:
            model = onnx.load(str(path), load_external_data=False)
        except Exception as error:  # protobuf raises its own kinds
            raise InputError(f"{path} is not a readable ONNX graph: {error}. Compile the checkpoint again.") from None
        data.append(
            {
                "graph": record.path,
                "opsets": {item.domain or STANDARD: item.version for item in model.opset_import},
                "operators": _operators(model.graph.node),
                "functions": {
                    f"{function.domain}::{function.name}": _operators(function.node) for function in model.functions
                },
            }
        )
    rows = [
        (graph["graph"] + (f" {function}" if function else ""), *operator.rpartition("::")[::2], f"{number:,}")
        for graph in data
        for function, operators in {"": graph["operators"], **graph["functions"]}.items()
        for operator, number in operators.items()
    ]
    return data, lambda: print_table(Table(columns=("graph", "domain", "operator", "nodes>"), rows=rows))


def _operators(nodes: Any) -> dict[str, int]:
    """domain::operator -> nodes, the most frequent first; subgraphs (If, Loop) included."""
    counts: Counter[str] = Counter()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        counts[f"{node.domain or STANDARD}::{node.op_type}"] += 1
        for attribute in node.attribute:
            waiting += attribute.g.node
            for graph in attribute.graphs:
                waiting += graph.node
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
