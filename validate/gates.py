"""Limits that a candidate must keep, as one table; a comparison that breaks one, or finds a part broken, ends with exit 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from corral.spec.errors import CheckFailed, InputError
from corral.validate.report import CandidateResult, Report


@dataclass(frozen=True)
class Gate:
    """One limit: its name (as in `--max-kl`), what it is about, the measured number, and how to say it."""

    name: str
    about: str
    measure: Callable[[CandidateResult], float]
    at_least: bool  # otherwise: at most
    unit: str

    def keeps(self, value: float, limit: float) -> bool:
        # Written so that NaN, which compares false with everything, keeps no limit.
        return value >= limit if self.at_least else value <= limit


GATES = {
    gate.name: gate
    for gate in (
        Gate("max_kl", "mean KL divergence", lambda c: c.accuracy.kl.mean, False, " nats a token"),
        Gate("min_top1", "same top-1", lambda c: c.accuracy.top1_agreement.mean, True, " (share of tokens)"),
        Gate("max_perplexity_ratio", "perplexity ratio", lambda c: c.accuracy.perplexity_ratio.mean, False, ""),
    )
}


def check_gates(report: Report, limits: Mapping[str, float | None]) -> None:
    """Hold every candidate against every limit that is not None. Raises CheckFailed naming all that are broken.

    A candidate with a part that is broken (`CandidateResult.verdict`) keeps no limits worth having: that is told instead.
    """
    located = [f"{found.name} is broken in {found.verdict}" for found in report.candidates if found.verdict]
    if located:
        raise CheckFailed(
            f"{'; '.join(located)}. Noise of quantization is not like this. Run `corral inspect --verify` on it, and compile "
            "the checkpoint again."
        )
    broken = [
        f"{candidate.name}: {gate.about} is {value:.6g}, expected at {'least' if gate.at_least else 'most'} "
        f"{limit:g}{gate.unit}"
        for name, limit in limits.items()
        if limit is not None
        for candidate in report.candidates
        for gate in [_gate_named(name)]
        if not gate.keeps(value := gate.measure(candidate), limit)
    ]
    if broken:
        raise CheckFailed(
            f"{'; '.join(broken)}. Compile with more bits or a smaller --group-size, or move the gate if that is "
            "what you meant."
        )


def _gate_named(name: str) -> Gate:
    if name not in GATES:
        raise InputError(f'gate "{name}" is not known; expected one of {", ".join(GATES)}.')
    return GATES[name]
