"""Capture: the graph's inputs, outputs, axes and nodes are those of the contract, at any size, without weights."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.exporter.capture import SCOPE, capture
from corral.model.checkpoint.names import expected_parameters
from corral.spec import graph_io
from corral.spec.model_config import parse_config

Config = Callable[[str], dict[str, Any]]


@pytest.mark.parametrize("form", ["scout", "maverick", "guard"])
def test_inputs_outputs_and_axes_are_the_contract(tiny_config: Config, form: str) -> None:
    config = parse_config(tiny_config(form))
    graph = capture(config).graph
    shapes = {
        value.name: [str(d) if not isinstance(d, int) else d for d in value.shape or ()] for value in graph.inputs
    }
    assert shapes[graph_io.EMBEDDINGS] == ["batch", "tokens", 64]
    assert shapes[graph_io.POSITIONS] == ["batch", "tokens"]
    assert shapes[graph_io.LOGIT_ROWS] == ["batch", "rows"]
    assert shapes[graph_io.past_length("chunked")] == ["batch"]
    assert shapes[graph_io.past_key(0)] == ["batch", 2, "capacity_chunked", 16]
    assert shapes[graph_io.past_value(3)] == ["batch", 2, "capacity_global", 16]
    outputs = {value.name: value.shape for value in graph.outputs}
    assert list(outputs) == [
        graph_io.LOGITS,
        *(name(i) for i in range(5) for name in (graph_io.present_key, graph_io.present_value)),
    ]


def test_nodes_of_the_corral_domain_are_one_per_layer_and_say_its_kind(tiny_config: Config) -> None:
    graph = capture(parse_config(tiny_config("maverick"))).graph
    counts = Counter(node.op_type for node in graph if node.domain == "corral")
    assert counts == {"RopeAttention": 4, "NopeAttention": 1, "MoE": 2}
    chunks = [node.attributes["chunk_size"].as_int() for node in graph if "Attention" in node.op_type]
    assert chunks == [16, 16, 16, 0, 16]


def test_only_tokens_with_logits_go_on_from_the_last_layers_attention(tiny_config: Config) -> None:
    graph = capture(parse_config(tiny_config("maverick"))).graph
    picks = [node.metadata_props[SCOPE] for node in graph if node.op_type == "GatherElements"]
    assert sorted(picks) == ["layers.4", "layers.4.self_attn"]


FULL_SCOUT = {
    "model_type": "llama4_text", "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192,
    "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
    "head_dim": 128, "num_local_experts": 16, "attention_chunk_size": 8192, "max_position_embeddings": 10485760,
    "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0,
    "high_freq_factor": 1.0, "original_max_position_embeddings": 8192},
}  # fmt: skip


def write_sparse_checkpoint(directory: Path, config: dict[str, Any]) -> int:
    """A safetensors file with a true header and no data on disk (a hole), bf16; returns its apparent size."""
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in expected_parameters(parse_config(config)).items():
        size = 2
        for axis in shape:
            size *= axis
        source = name if name == "lm_head.weight" else f"model.{name}"
        header[source] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    (directory / "config.json").write_text(json.dumps(config))
    return offset


def test_capturing_and_planning_full_scout_takes_less_than_2_gib(tmp_path: Path) -> None:
    """109 billion parameters, none of them read: the file's data is a hole."""
    assert write_sparse_checkpoint(tmp_path, FULL_SCOUT) > 210e9
    code = (
        "import sys\n"
        "from corral.graphs.compiler import lower\n"
        "from corral.model.checkpoint.open import open_checkpoint\n"
        "from corral.spec.recipe import Recipe\n"
        "work = lower(open_checkpoint(sys.argv[1]), Recipe(target='cpu', weights='int4'))\n"
        "print(sum(e.parameters for e in work.plan), sum(e.nbytes for e in work.plan))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    parameters, stored = map(int, run.stdout.split())
    assert parameters == pytest.approx(107.77e9, rel=1e-3)  # text decoder of the published 109 B
    assert stored == pytest.approx(57.7e9, rel=0.02)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < 2 << 30, f"peak {peak / 2**30:.2f} GiB"
