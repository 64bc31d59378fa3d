from __future__ import annotations

import dataclasses
import math

import pytest

from corral.spec.errors import CheckFailed, InputError
from corral.validate.accuracy import Accuracy
from corral.validate.gates import GATES, check_gates
from corral.validate.greedy import GreedyDivergence
from corral.validate.layers import Fidelity
from corral.validate.report import CandidateResult, Measured, ReferenceResult, Report
from corral.validate.statistics import Distribution, Estimate
from corral.validate.verdict import Verdict


def report(*, kl: float = 0.01, top1: float = 0.95, ratio: float = 1.01) -> Report:
    accuracy = Accuracy(
        kl=Distribution(mean=kl, stderr=0.0, p50=0.0, p95=0.0, p99=0.0, max=0.0),
        top1_agreement=Estimate(top1, 0.0),
        top5_agreement=Estimate(1.0, 0.0),
        perplexity=Estimate(5.0, 0.1),
        perplexity_ratio=Estimate(ratio, 0.0),
    )
    return Report(
        reference=ReferenceResult(
            name="fp32", kind="bundle", bytes=8, perplexity=Estimate(5.0, math.nan), latency=None
        ),
        candidates=(
            CandidateResult(
                name="int4", bytes=1, accuracy=accuracy, latency=None, greedy=GreedyDivergence(alike=(3,), tokens=3)
            ),
        ),
        measured=Measured(
            predictions=1, windows=1, window=2, prompt_tokens=1, decode_tokens=2, repeats=1, threads=1, provider="cpu"
        ),
    )


def test_limits_that_are_kept_are_silent() -> None:
    check_gates(report(), {"max_kl": 0.01, "min_top1": 0.95, "max_perplexity_ratio": 1.01})
    check_gates(report(), dict.fromkeys(GATES))


def test_every_broken_limit_is_told_with_what_was_got() -> None:
    with pytest.raises(CheckFailed) as caught:
        check_gates(report(), {"max_kl": 0.001, "min_top1": 0.99, "max_perplexity_ratio": 1.5})
    message = str(caught.value)
    assert "int4: mean KL divergence is 0.01, expected at most 0.001 nats a token" in message
    assert "int4: same top-1 is 0.95, expected at least 0.99" in message
    assert "ratio" not in message
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("gate", GATES)
def test_nan_keeps_no_limit(gate: str) -> None:
    with pytest.raises(CheckFailed, match="is nan"):
        check_gates(report(kl=math.nan, top1=math.nan, ratio=math.nan), {gate: 0.5})


def test_a_broken_part_is_told_whatever_the_limits() -> None:
    verdict = Verdict(part="experts", layer=2, experts=(5,), found=Fidelity(signal_to_noise=0.0, gain=0.0))
    good = report()
    bad = dataclasses.replace(good, candidates=(dataclasses.replace(good.candidates[0], verdict=verdict),))
    with pytest.raises(CheckFailed, match=r"int4 is broken in layer 2, expert 5: 0\.0 dB"):
        check_gates(bad, dict.fromkeys(GATES))


def test_unknown_gate_is_refused() -> None:
    with pytest.raises(InputError, match='gate "max_k" is not known; expected one of max_kl'):
        check_gates(report(), {"max_k": 1.0})


def test_json_has_no_nan() -> None:
    assert report().to_json()["reference"]["perplexity_stderr"] is None
