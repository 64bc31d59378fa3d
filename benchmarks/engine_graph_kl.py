"""What FP8 activations cost: KL from a checkpoint of the graphs that a TensorRT builder is given, run by ONNX Runtime.

    python benchmarks/engine_graph_kl.py demo/demo-scout demo/demo-scout/heldout.txt

On the CPU, so this is an emulation: nothing is executed by TensorRT.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from corral.graphs import compile
from corral.model.checkpoint import open_checkpoint
from corral.model.checkpoint.reference import load_reference
from corral.runtime import LLM
from corral.runtime.kv_cache import KvCache
from corral.runtime.session import Step
from corral.spec import graph_io
from corral.spec.bundle import Bundle
from corral.spec.kv_layout import KvLayout
from corral.spec.recipe import Recipe
from corral.validate.divergence import diverge, predict

WINDOWS, WINDOW = 8, 512
RECIPES = (
    Recipe(target="tensorrt-rtx", weights="fp16"),
    Recipe(target="tensorrt-rtx", weights="fp8"),
    Recipe(target="tensorrt-rtx", weights="int4", method="rtn-mse", group_size=32),
    Recipe(target="tensorrt-rtx", weights="w4a8", method="rtn-mse", group_size=32),
)


class Session:
    """A lowered graph in ONNX Runtime, one step after the other. Higher levels of optimization break graphs with FP8."""

    def __init__(self, bundle: Bundle) -> None:
        (record,) = bundle.manifest.graphs
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        path = str(bundle.path(record.path))
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def new_caches(self, layouts: Sequence[KvLayout], max_context: int) -> KvCache:
        return KvCache(layouts, max_context)

    def run(self, step: Step) -> np.ndarray:
        caches = {graph_io.past_key(i): (graph_io.present_key(i), a) for i, a in enumerate(step.caches.keys)}
        caches |= {graph_io.past_value(i): (graph_io.present_value(i), a) for i, a in enumerate(step.caches.values)}
        feeds: dict[str, Any] = {
            graph_io.EMBEDDINGS: step.embeddings_BSH,
            graph_io.POSITIONS: step.positions_BS,
            graph_io.LOGIT_ROWS: step.logit_rows_BR,
            **{graph_io.past_length(kv_class): rows for kv_class, rows in step.past_length_B.items()},
            **{past: array for past, (_, array) in caches.items()},
        }
        names = [output.name for output in self._session.get_outputs()]
        out = dict(zip(names, self._session.run(names, feeds), strict=True))
        for present, array in caches.values():
            array[...] = out[present]
        return out[graph_io.LOGITS]

    def release(self) -> None: ...


def main(path: str, text: str) -> None:
    checkpoint = open_checkpoint(Path(path))
    model = load_reference(checkpoint)
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as out:
            bundle = compile(
                path, Path(out) / "bundle", dataclasses.replace(recipe, max_context=WINDOW, calibration_tokens=8192)
            )
            ready = Bundle(bundle.directory, dataclasses.replace(bundle.manifest, stage="ready"))
            llm = LLM(ready, session=Session(ready), max_context=WINDOW)
            assert llm.tokenizer is not None
            ids = np.array(llm.tokenizer.encode(Path(text).read_text())[: WINDOWS * WINDOW]).reshape(WINDOWS, WINDOW)
            means = []
            for window in ids:
                with torch.no_grad():
                    reference = predict(model.logits(torch.from_numpy(window[None]))[0, :-1].numpy(), window[1:])
                means.append(diverge(reference, llm.score(window.tolist())[:-1], window[1:]).kl_n.mean())
            error = np.std(means, ddof=1) / np.sqrt(WINDOWS)
            print(f"{recipe.weights} {recipe.method}: KL {np.mean(means):.4f} ± {error:.4f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
