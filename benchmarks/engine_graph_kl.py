"""What FP8 activations cost: KL from a checkpoint of the graphs that a TensorRT builder is given, run by ONNX Runtime.

    python benchmarks/engine_graph_kl.py demo/demo-scout demo/demo-scout/heldout.txt

On the CPU, so this is an emulation: nothing is executed by TensorRT.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from corral.graphs import compile
from corral.model.checkpoint import open_checkpoint
from corral.model.checkpoint.reference import load_reference
from corral.runtime import LLM
from corral.spec.bundle import Bundle
from corral.spec.recipe import Recipe
from corral.validate.divergence import diverge, predict
from corral.validate.engine_graph import EngineGraph, as_ready

WINDOWS, WINDOW = 8, 512
RECIPES = (
    Recipe(target="tensorrt-rtx", weights="fp16"),
    Recipe(target="tensorrt-rtx", weights="fp8"),
    Recipe(target="tensorrt-rtx", weights="int4", method="rtn-mse", group_size=32),
    Recipe(target="tensorrt-rtx", weights="w4a8", method="rtn-mse", group_size=32),
)


def session_of(bundle: Bundle) -> EngineGraph:
    """The graph in ONNX Runtime. Higher levels of optimization break graphs with FP8."""
    (record,) = bundle.manifest.graphs
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(str(bundle.path(record.path)), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return EngineGraph(lambda inputs: dict(zip(names, session.run(names, inputs), strict=True)))


def main(path: str, text: str) -> None:
    checkpoint = open_checkpoint(Path(path))
    model = load_reference(checkpoint)
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as out:
            bundle = compile(
                path, Path(out) / "bundle", dataclasses.replace(recipe, max_context=WINDOW, calibration_tokens=8192)
            )
            ready = as_ready(bundle)
            llm = LLM(ready, session=session_of(ready), max_context=WINDOW)
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
