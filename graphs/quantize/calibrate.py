"""The largest magnitude that each matrix is multiplied with, on a text: absolute-maximum calibration.

The reference model runs in float32, whole, so this is for models that fit into memory so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corral.model.checkpoint.checkpoint import Checkpoint
from corral.spec.errors import EnvironmentProblem, InputError
from corral.spec.estimate import calibration_bytes
from corral.spec.machine import usable_memory
from corral.spec.quant_scheme import scheme_named
from corral.spec.recipe import Recipe

TEXT = Path(__file__).with_name("calibration.txt")
INPUT, ACTIVATED = "input", "activated"  # of experts: what their first and their second matrix see


def activation_ranges(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, float]:
    """`largest_inputs` on the text that corral ships; empty where the recipe's scheme keeps activations as they are."""
    if not scheme_named(recipe.weights).is_float:
        return {}
    return largest_inputs(checkpoint, TEXT.read_text(encoding="utf-8"))


def largest_inputs(checkpoint: Checkpoint, text: str) -> dict[str, float]:
    """Module of the model -> largest magnitude of its input while it reads `text`.

    Experts have two, at "layers.0.feed_forward.experts.input" and "….activated", which all of a layer share: an expert
    that the text never visits has them, too. Raises InputError without a tokenizer, EnvironmentProblem where memory does
    not suffice.
    """
    import torch
    from torch import nn

    from corral.model.checkpoint.reference import load_reference
    from corral.model.text import Experts

    needed = calibration_bytes(checkpoint.config, "fp8")
    if needed > usable_memory():
        raise EnvironmentProblem(
            f"calibrating {checkpoint.directory} runs the whole model in float32, which takes {needed / 1e9:.1f} GB of "
            "memory, more than is free. Use --weights int4, which needs no calibration, or a larger machine."
        )
    ids = torch.tensor([_token_ids(checkpoint, text)])
    model, ranges = load_reference(checkpoint), dict[str, float]()

    def note(name: str, x: torch.Tensor) -> None:
        ranges[name] = max(ranges.get(name, 0.0), float(x.abs().max()))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
        elif isinstance(module, Experts):
            _watch(module, name, note)
    with torch.no_grad():
        model.logits(ids)
    return ranges


def _watch(experts: Any, name: str, note: Any) -> None:
    activated = experts.activated

    def watched(expert: int, x: Any) -> Any:
        note(f"{name}.{INPUT}", x)
        note(f"{name}.{ACTIVATED}", y := activated(expert, x))
        return y

    experts.activated = watched


def _token_ids(checkpoint: Checkpoint, text: str) -> list[int]:
    data = checkpoint.tokenizer()
    if data is None:
        raise InputError(
            f"{checkpoint.directory} has no tokenizer.json, and FP8 is calibrated on a text. Add the tokenizer's file, "
            "or use --weights int4, which needs no calibration."
        )
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_buffer(data).encode(text).ids
    return ids
