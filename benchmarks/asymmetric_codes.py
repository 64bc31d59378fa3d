"""What a zero point for each group would be worth: KL of a checkpoint with all matrices in symmetric and in asymmetric codes.

    python benchmarks/asymmetric_codes.py demo/demo-scout

Weights alone, in the PyTorch model, on text that calibration has not seen. Asymmetric codes are made here, as `rtn_mse` and
`gptq` make symmetric ones: the searched clip ratio, the least-squares scale, the same rounding in activation order.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from corral.graphs.calibrate.calibration_text import read_calibration_text
from corral.graphs.calibrate.gather import gather
from corral.graphs.calibrate.statistics import Statistics, statistics_of
from corral.graphs.quantize.gptq import _damping, _hessian, _inverse_factor
from corral.graphs.quantize.methods import MIN_TOKENS
from corral.graphs.quantize.rtn_mse import CLIP_RATIOS
from corral.model.checkpoint import open_checkpoint
from corral.spec.quant_scheme import GROUP_SIZES, scheme_named
from corral.spec.recipe import Recipe
from corral.spec.weight_plan import Source
from corral.tune import sensitivity
from corral.tune.choice import Choice
from corral.tune.choice import rounded as symmetric
from corral.tune.parts import parts_of

MEASURED = 16  # windows of 512 tokens
SCALE_BITS = 32
Floats = NDArray[np.float32]


def grid(weight: Floats, importance: Floats, top: int, group: int) -> tuple[Floats, Floats]:
    """Scales and zero points [outputs, groups] of least weighed squared error: value = (code - zero) * scale."""
    groups = weight.reshape(len(weight), -1, group)
    weigh = importance.reshape(1, -1, group)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales, zeros, best = np.ones_like(low), np.zeros_like(low), np.full(low.shape, np.inf)

    def keep(scale: Floats, zero: Floats) -> None:
        values = nearest(groups, scale[..., None], zero[..., None], top) * scale[..., None]
        error = (np.square(values - groups) * weigh).sum(-1)
        better = error < best
        best[better], scales[better], zeros[better] = error[better], scale[better], zero[better]

    for ratio in CLIP_RATIOS:
        scale = np.maximum((high - low) * ratio / top, 1e-12)
        keep(scale, np.clip(np.round(-low * ratio / scale), 0, top))
    codes = nearest(groups, scales[..., None], zeros[..., None], top)
    fitted = (groups * codes * weigh).sum(-1) / np.maximum((codes * codes * weigh).sum(-1), 1e-30)
    keep(np.where(fitted > 0, fitted, scales), zeros.copy())
    return scales, zeros


def nearest(values: Floats, scales: Floats, zeros: Floats, top: int) -> Floats:
    """Codes less their zero points."""
    return np.clip(np.round(values / scales) + zeros, 0, top) - zeros


def asymmetric(weight: Floats, choice: Choice, statistics: Statistics, source: Source) -> Floats:
    """The values of a matrix [outputs, inputs] that is stored with zero points."""
    top = 2 ** (scheme_named(choice.weights).bits or 0) - 1
    seen = statistics.of(source) if choice.method == "gptq" else None
    if seen is None or seen["tokens"].item() < MIN_TOKENS:
        scales, zeros = grid(weight, np.ones(weight.shape[1], np.float32), top, choice.group_size)
        groups = weight.reshape(len(weight), -1, choice.group_size)
        return (nearest(groups, scales[..., None], zeros[..., None], top) * scales[..., None]).reshape(weight.shape)
    hessian = _hessian(seen)
    importance = hessian.diagonal() + np.float32(_damping(hessian))
    scales, zeros = grid(weight, importance, top, choice.group_size)
    order = np.argsort(-hessian.diagonal(), kind="stable")
    upper = _inverse_factor(hessian, order).float()
    left, done = torch.from_numpy(weight.T[order]), np.empty_like(weight.T)
    for j, column in enumerate(order):
        scale, zero = (torch.from_numpy(part[:, column // choice.group_size].copy()) for part in (scales, zeros))
        value = (torch.clamp(torch.round(left[j] / scale) + zero, 0, top) - zero) * scale
        left[j + 1 :].addr_(upper[j, j + 1 :], (left[j] - value) / upper[j, j], alpha=-1)
        done[column] = value.numpy()
    return np.ascontiguousarray(done.T)


def main(path: str) -> None:
    checkpoint = open_checkpoint(Path(path))
    ids = read_calibration_text(checkpoint, Recipe(calibration_tokens=65536 + MEASURED * 512)).ids
    parts = [part for part in parts_of(checkpoint.config, checkpoint.names) if not part.is_table]
    with tempfile.TemporaryDirectory() as scratch:
        statistics = statistics_of(checkpoint, Path(scratch), "asymmetric")
        gather(checkpoint, ids[:-MEASURED], statistics, products="whole")
        meter = sensitivity.Meter(checkpoint, statistics, ids[-MEASURED:])
        for weights, method in (("int4", "rtn-mse"), ("int4", "gptq"), ("int8", "gptq")):
            bits = scheme_named(weights).bits or 0
            for group in GROUP_SIZES:
                chosen = dict.fromkeys(parts, Choice(weights=weights, group_size=group, method=method))
                for name, how, extra in (("symmetric", symmetric, 0), ("asymmetric", asymmetric, bits)):
                    sensitivity.rounded = how
                    size = bits + (SCALE_BITS + extra) / group
                    print(f"{weights} g{group} {method} {name}: {size:.2f} bits, KL {meter.divergence(chosen):.5f}")


if __name__ == "__main__":
    main(sys.argv[1])
