"""Published claims about where the herd fits, and figures that can be worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from corral.spec.errors import InputError
from corral.spec.estimate import Estimate, Serving, compile_peak_bytes, estimate
from corral.spec.gpus import GPUS, gpu_named
from corral.spec.presets import PRESETS


def of(model: str, gpu: str, **serving: object) -> Estimate:
    return estimate(PRESETS[model].model, dataclasses.replace(Serving(), **serving), GPUS[gpu])  # type: ignore[arg-type]


def test_scout_int4_fits_one_h100() -> None:
    assert of("scout", "h100").fits
    assert of("scout", "h100").weights_bytes == pytest.approx(58.8e9, rel=0.01)


def test_scout_bf16_needs_several() -> None:
    scout = of("scout", "h100", weights="bf16")
    assert not scout.fits
    assert scout.gpus == 3
    assert scout.weights_bytes == pytest.approx(215.6e9, rel=0.001)


@pytest.mark.parametrize(("weights", "fits"), [("int4", True), ("fp8", True), ("bf16", False)])
def test_maverick_fits_one_host_unless_bf16(weights: str, fits: bool) -> None:
    assert of("maverick", "dgx-h100", weights=weights).fits is fits
    assert not of("maverick", "h100", weights=weights).fits


def test_caches_at_the_longest_contexts_by_hand() -> None:
    scout, maverick = of("scout", "h200", context=10 << 20), of("maverick", "h200", context=1 << 20)
    row = 2 * 8 * 128 * 2  # key and value, 8 heads of 128, two bytes
    assert scout.kv == {"chunked": 36 * 8192 * row, "global": 12 * (10 << 20) * row}
    assert maverick.kv == {"chunked": 36 * 8192 * row, "global": 12 * (1 << 20) * row}
    assert of("scout", "h200").kv_bytes == pytest.approx(7.65e9, rel=0.01)


def test_ten_million_tokens_of_scout_want_a_gpu_for_each_global_layer_of_an_h100() -> None:
    assert of("scout", "h100", context=10 << 20).gpus == 12
    assert of("scout", "dgx-h100", context=10 << 20).gpus is None
    assert of("scout", "h100", context=10 << 20, batch=2).gpus is None  # one layer's cache is too large


def test_only_chosen_experts_are_read() -> None:
    one, many = of("scout", "h100", context=1), of("scout", "h100", context=1, batch=1000)
    experts = one.weights["experts"]
    rest = one.weights_bytes - experts - one.weights["embedding"]
    assert one.bytes_per_token == pytest.approx(rest + experts / 16, rel=1e-3)
    assert many.bytes_per_token - many.kv_bytes == pytest.approx(rest + experts, rel=1e-3)


def test_cost_follows_from_price_and_bandwidth() -> None:
    scout = of("scout", "h100", price_per_hour=3.6)
    assert scout.cost_per_million == pytest.approx(3.6 / 3600 * 1e6 * scout.bytes_per_token / 3.35e12)
    assert of("scout", "h100").cost_per_million is None


@pytest.mark.parametrize(
    ("serving", "says"),
    [
        ({"context": 11 << 20}, "expected 1 to the model's 10485760"),
        ({"batch": 0}, "batch is 0"),
        ({"kv": "int2"}, "expected one of fp32, bf16, fp8"),
        ({"weights": "int5"}, "expected one of fp32"),
        ({"price_per_hour": -1.0}, "price per hour -1.0"),
    ],
)
def test_wrong_input_says_what_is_right(serving: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        of("scout", "h100", **serving)


def test_an_unknown_gpu_names_the_known() -> None:
    with pytest.raises(InputError, match="h100, h200"):
        gpu_named("h1000")


def test_compile_memory_bounds_what_full_scout_took() -> None:
    """Measured with two processes (docs/full-size.md)."""
    assert 2.5 * 2**30 < compile_peak_bytes(2) < 5 * 2**30
