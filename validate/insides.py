"""What a build computes inside, layer by layer: of the PyTorch model by hooks, of a bundle by more outputs of its graphs.

embeddings ─► [ + attention ─► between ─► + shared expert (or dense MLP) + experts ─► after ] each layer ─► logits
                                  └─► router logits ─► which experts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from corral.spec.bundle import Bundle, open_bundle
from corral.spec.cpu_ops import ROUTED_INPUTS
from corral.spec.errors import InputError
from corral.spec.kv_layout import KvLayout
from corral.spec.manifest import MANIFEST_NAME, GraphRecord
from corral.spec.model_config import ModelConfig
from corral.spec.progress import Progress, silent

# "embeddings" and "logits", and of each layer "layers.3.between", ".after" and, where it has experts, ".router" and
# ".experts" -> [tokens, width]; "logits" is [tokens, vocabulary].
Insides = dict[str, NDArray[np.float32]]
Look = Callable[[Sequence[int]], Insides]
# The operators that add to the residual stream, and which output is the sum.
SUM_OUTPUT = {"Add": 0, "AddRmsNorm": 1}


class _Session(Protocol):
    tapped: Any

    def run(self, step: Any) -> Any: ...
    def release(self) -> None: ...


def look_into(path: Path, *, provider: str, threads: int | None, progress: Progress = silent) -> Look:
    """Open a build for looking: the function gives the insides for a window of token ids, which starts at position 0.

    Raises InputError where `path` is no build, or a bundle whose graph does not name what it computes.
    """
    if (path / MANIFEST_NAME).is_file():
        return _bundle(open_bundle(path, progress=progress), provider, threads)
    return _checkpoint(path, progress)


def inside_names(config: ModelConfig, layers: range) -> list[str]:
    """The names of what is looked at in these layers, in the order of computation."""
    parts = [
        ("between", "router", "experts", "after") if layer.moe else ("between", "after") for layer in config.layers
    ]
    return [f"layers.{i}.{part}" for i in layers for part in parts[i]]


def _checkpoint(path: Path, progress: Progress) -> Look:
    import torch

    from corral.model.checkpoint import load_reference, open_checkpoint

    model = load_reference(open_checkpoint(path, progress=progress))
    found: Insides = {}

    def note(name: str, value: Any) -> None:
        found[name] = value.detach().flatten(0, -2).float().numpy().copy()

    def after(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: note(name, output[0] if isinstance(output, tuple) else output)

    def before(name: str) -> Callable[..., None]:
        return lambda module, inputs: note(name, inputs[0])

    model.layers[0].register_forward_pre_hook(before("embeddings"))
    for i, facts in enumerate(model.config.layers):
        layer: Any = model.layers[i]
        layer.post_attention_layernorm.register_forward_pre_hook(before(f"layers.{i}.between"))
        layer.register_forward_hook(after(f"layers.{i}.after"))
        if facts.moe:
            layer.feed_forward.router.register_forward_hook(after(f"layers.{i}.router"))
            layer.feed_forward.experts.register_forward_hook(after(f"layers.{i}.experts"))

    def look(token_ids: Sequence[int]) -> Insides:
        with torch.inference_mode():
            note("logits", model.logits(torch.tensor([list(token_ids)])))
        return dict(found)

    return look


def _bundle(bundle: Bundle, provider: str, threads: int | None) -> Look:
    from corral.runtime.llm import LLM
    from corral.runtime.onnxruntime_session import OnnxRuntimeSession

    session = OnnxRuntimeSession(bundle, provider=provider, threads=threads, tap=lambda record: _tapped(bundle, record))
    steps: list[Insides] = []

    class Noting:
        """Runs the tapped graphs and keeps what each step computed."""

        def run(self, step: Any) -> Any:
            logits = session.run(step)
            every = {"embeddings": step.embeddings_BSH, **session.tapped}
            steps.append({name: value.reshape(-1, value.shape[-1]).copy() for name, value in every.items()})
            return logits

        def new_caches(self, layouts: Sequence[KvLayout], max_context: int) -> Any:
            return session.new_caches(layouts, max_context)

        def release(self) -> None:
            session.release()

    llm = LLM(bundle, session=Noting())

    def look(token_ids: Sequence[int]) -> Insides:
        steps.clear()
        logits = np.concatenate(list(llm.score_pieces(list(token_ids))))
        return {"logits": logits} | {name: np.concatenate([step[name] for step in steps]) for name in steps[0]}

    return look


def _tapped(bundle: Bundle, record: GraphRecord) -> Any:
    """The graph with one more output for each name of `inside_names`, found by the names that the compiler gives nodes."""
    import onnx

    from corral.runtime.onnxruntime_graph import Tap

    model = onnx.load(bundle.path(record.path), load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    names = inside_names(bundle.manifest.model, range(record.first_layer, record.end_layer))
    for name in names:
        node = _experts_alone(nodes, name) or _identity(nodes, name)
        if node is None:
            raise InputError(
                f"{bundle.path(record.path)} does not name what layer {name.split('.')[1]} computes, so nobody can look "
                "inside. Compile the checkpoint again with this version of corral."
            )
        model.graph.node.append(node)
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return Tap(model.SerializeToString(), tuple(names))


def _experts_alone(nodes: dict[str, Any], name: str) -> Any:
    """Where an operator has added the shared expert's answer already: the one that computes without it."""
    import onnx

    layer, _, part = name.rpartition(".")
    both = nodes.get(f"{layer}.feed_forward.TiledMoE")
    if part != "experts" or both is None:
        return None
    inputs = [value for part in ROUTED_INPUTS for value in both.input[part]]
    attributes = {attribute.name: attribute.i for attribute in both.attribute}
    routed = {key: value for key, value in attributes.items() if not key.startswith("shared_")}
    return onnx.helper.make_node("TiledExperts", inputs, [name], domain=both.domain, **routed)


def _identity(nodes: dict[str, Any], name: str) -> Any:
    import onnx

    value = _value(nodes, name)
    return None if value is None else onnx.helper.make_node("Identity", [value], [name])


def _value(nodes: dict[str, Any], name: str) -> str | None:
    layer, _, part = name.rpartition(".")
    if part == "experts":  # what is added to the shared expert's answer
        added = nodes.get(f"{layer}.feed_forward.Add")
        answers = (
            [value for value in added.input if value.startswith(f"{layer}.feed_forward.experts.")] if added else []
        )
        return answers[0] if len(answers) == 1 else None
    if part == "router":
        node = nodes.get(f"{layer}.feed_forward.router.MatMul")
        return None if node is None else str(node.output[0])
    # In the layer itself, not in its parts, the residual stream is added to twice, by whichever operator.
    sums = [
        str(node.output[SUM_OUTPUT[node.op_type]])
        for name, node in nodes.items()
        if name.rpartition(".")[0] == layer and node.op_type in SUM_OUTPUT
    ]
    return sums[part == "after"] if len(sums) == 2 else None
