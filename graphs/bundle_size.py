"""How large a bundle will be, before a weight is computed: to the byte."""

from __future__ import annotations

from corral.graphs.execute.shards import shard_sizes
from corral.graphs.graph_file import graph_bytes, plan_bytes
from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.split_stages import place_weights, split_stages
from corral.model.checkpoint.checkpoint import Checkpoint


def bundle_bytes(work: ModelAndPlan, checkpoint: Checkpoint) -> int:
    """All files that `write_bundle` lists for a lowered graph and plan (`Manifest.bytes`). Splits the graph into stages."""
    graphs = split_stages(work)
    placements = place_weights(work, graphs)
    weights = sum(shard_sizes(placements).values())
    structure = sum(len(graph_bytes(graph.model, work.plan, placements)) for graph in graphs)
    tokenizer, template = checkpoint.tokenizer() or b"", checkpoint.chat_template() or ""
    return weights + structure + len(plan_bytes(work.plan)) + len(tokenizer) + len(template.encode())
