"""`corral plan` says what fits where, for presets and checkpoints, without reading weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.spec.expert_tiles import chosen_tiles
from corral.spec.presets import PRESETS

Corral = Callable[..., Any]


def test_scout_at_128k(corral: Corral) -> None:
    shown = corral("plan", "scout").stdout
    for fact in ("107.8 B parameters", "17.2 B active", "36 rope, 12 nope", "1 × H100", "vision tower"):  # noqa: RUF001
        assert fact in shown
    data = json.loads(corral("plan", "scout", "--json").stdout)
    assert data["parameters"]["total"] == 107_769_861_120
    assert data["fits"] is True and data["kv_bytes"] > 7e9
    assert data["weights_bytes"] == data["builds"]["int4"]["weights_bytes"] < data["builds"]["bf16"]["weights_bytes"]


def test_what_does_not_fit_says_what_would(corral: Corral) -> None:
    shown = corral("plan", "scout", "--context", "10M", "--gpu", "dgx-h100", "--weights", "int4").stdout
    assert "does not fit; 12 × H100 80 GB would" in shown  # noqa: RUF001


def test_behemoth_says_what_is_inferred(corral: Corral) -> None:
    assert "inferred, not published: " in corral("plan", "behemoth", "--price-per-hour", 2.5).stdout


def test_a_checkpoint_and_its_exact_plan(corral: Corral, tiny_checkpoint: Callable[[str], Path]) -> None:
    options = ("--group-size", 32, "--exact", "--weights", "int8", "--json")
    data = json.loads(corral("plan", tiny_checkpoint("scout"), *options).stdout)
    assert data["exact_weights_bytes"] == data["weights_bytes"]


def test_the_exact_plan_of_fp8_reads_no_weight_either(corral: Corral) -> None:
    options = ("--exact", "--target", "tensorrt-rtx", "--weights", "fp8", "--json")
    data = json.loads(corral("plan", "synthetic:debug", *options).stdout)
    assert data["weights_bytes"] < data["exact_weights_bytes"] < 1.05 * data["weights_bytes"]
    assert data["context"] == 4096  # all that the model has


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere is neither a checkpoint directory nor a preset; presets: scout"),
        (["scout", "--context", "lots"], "such as 131072, 128k or 10M"),
        (["scout", "--context", "11M"], "expected 1 to the model's 10485760"),
        (["scout", "--gpu", "abacus"], "expected one of h100"),
        (["scout", "--group-size", "7"], "expected one of 32, 64, 128"),
    ],
)
def test_mistakes(corral: Corral, arguments: list[str], says: str) -> None:
    assert says in corral("plan", *arguments, code=2).stderr


def test_tiles_of_experts_for_a_gpu(corral: Corral) -> None:
    """Only where engines are planned for; the same as a compile takes."""
    arguments = ("plan", "scout", "--gpu", "rtx4090", "--target")
    shown = corral(*arguments, "tensorrt-rtx").stdout
    assert "8 (chosen)" in shown and "computed, not measured" in shown
    data = json.loads(corral(*arguments, "tensorrt-rtx", "--json").stdout)["expert_tiles"]
    assert data["chosen"] == chosen_tiles(PRESETS["scout"].model, weights="int4", group_size=128, gpu="rtx4090") == 8
    assert {(row["tiles"], row["tokens"]) for row in data["figures"]} == {
        (1 << i, tokens) for i in range(7) for tokens in (1, 512)
    }
    for other in ("cpu", "tensorrt"):  # whose engines multiply by experts with corral's own kernels
        assert "tiles" not in corral(*arguments, other).stdout
    assert "tiles" not in corral("plan", "guard", "--target", "tensorrt-rtx").stdout
