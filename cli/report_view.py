"""A comparison as a table: size, cost in accuracy and gain in speed, each measured number with its spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from corral.cli.formats import DASH, TIMES, UNKNOWN, percent, seconds_range, size, with_error
from corral.cli.tables import Table, print_table

if TYPE_CHECKING:
    from corral.validate.latency import Latency
    from corral.validate.layers import Fidelity, LayerByLayer, LayerFidelity
    from corral.validate.report import CandidateResult, ReferenceResult, Report
    from corral.validate.statistics import Quantile

COLUMNS = ("build", "size>", "KL, nats>", "same top-1>", "perplexity>", "tokens/s>", "first token>")
LAYER_COLUMNS = (
    "layer", "attention>", "feed-forward>", "worst expert>", "after>", "same experts>", "experts visited>",
)  # fmt: skip
ACCURACY_COLUMNS = ("build", "same top-5>", "KL, p50>", "p95>", "p99>", "largest>", "greedy text alike>")
EXPERT_COLUMNS = ("layer", "expert>", "tokens>", "signal-to-noise, dB>", "gain>")
TASK_COLUMNS = ("task", "metric", "build", "score>", "published>", "documents>")
NOISIEST = 8  # experts that are listed


def report_table(report: Report, names: Mapping[str, str] | None = None) -> Table:
    """One row a build, the reference first; `names` replaces what builds are called."""
    called, reference = names or {}, report.reference
    first = (
        called.get(reference.name, reference.name) + (" (PyTorch)" if reference.kind == "checkpoint" else ""),
        size(reference.bytes),
        UNKNOWN,
        UNKNOWN,
        with_error(reference.perplexity.mean, reference.perplexity.stderr, decimals=2),
        *_speed(reference.latency),
    )
    rows = [
        (
            called.get(candidate.name, candidate.name),
            size(candidate.bytes),
            with_error(candidate.accuracy.kl.mean, candidate.accuracy.kl.stderr, decimals=4),
            percent(candidate.accuracy.top1_agreement.mean, candidate.accuracy.top1_agreement.stderr),
            TIMES
            + with_error(
                candidate.accuracy.perplexity_ratio.mean, candidate.accuracy.perplexity_ratio.stderr, decimals=3
            ),
            *_speed(candidate.latency),
        )
        for candidate in report.candidates
    ]
    return Table(columns=COLUMNS, rows=[first, *rows])


def show_report(report: Report, names: Mapping[str, str] | None = None) -> None:
    """Print the table, and under it how it was measured."""
    print_table(report_table(report, names))
    click.echo("\n   " + "\n   ".join(how_measured(report)))
    greedy = [f"{c.name} {c.greedy.median:g}" for c in report.candidates]
    tokens = report.candidates[0].greedy.tokens if report.candidates else 0
    click.echo(
        f"   Greedy text, tokens alike before the first that differs (median, of {tokens}): {', '.join(greedy)}.\n"
    )
    print_table(latency_table(report, names))
    _show_insides(report)
    if report.tasks:
        click.echo("\n   Tasks: share of right answers, ± one standard error by lm-eval")
        print_table(tasks_table(report))
        click.echo("   " + tasks_remark())


def how_measured(report: Report) -> tuple[str, str]:
    """What was scored, and what was timed."""
    measured = report.measured
    return (
        f"{measured.predictions:,} predictions in {measured.windows} windows of {measured.window} tokens; ± is one "
        "standard error, by windows.",
        f"Speed: median (lowest{DASH}highest) of {measured.repeats} runs, {measured.prompt_tokens} tokens in, "
        f"{measured.decode_tokens} out, batch 1, {measured.provider}, "
        f"{measured.threads} thread{'s' if measured.threads > 1 else ''}.",
    )


def accuracy_table(report: Report) -> Table:
    """One row a candidate: what the first table leaves out."""
    rows = [
        (
            candidate.name,
            percent(candidate.accuracy.top5_agreement.mean, candidate.accuracy.top5_agreement.stderr),
            *(
                with_error(getattr(candidate.accuracy.kl, share), None, decimals=4)
                for share in ("p50", "p95", "p99", "max")
            ),
            f"{candidate.greedy.median:g} of {candidate.greedy.tokens}",
        )
        for candidate in report.candidates
    ]
    return Table(columns=ACCURACY_COLUMNS, rows=rows)


def latency_table(report: Report, names: Mapping[str, str] | None = None) -> Table:
    """One row for each build that was timed: percentiles with their 95 % confidence intervals."""
    timed: list[ReferenceResult | CandidateResult] = [report.reference, *report.candidates]
    rows = [
        (
            (names or {}).get(result.name, result.name),
            *(_milliseconds(getattr(result.latency.between_tokens, share)) for share in ("p50", "p95", "p99")),
            _milliseconds(result.latency.first_tokens.p50),
        )
        for result in timed
        if result.latency
    ]
    return Table(columns=("ms", "a token, p50>", "p95>", "p99>", "first token, p50>"), rows=rows)


def _milliseconds(found: Quantile | None) -> str:
    if found is None:
        return "too few samples"
    value, low, high = (1000 * seconds for seconds in (found.value, found.low, found.high))
    return f"{value:.2f} ({low:.2f}{DASH}{high:.2f})"


def layers_table(candidate: CandidateResult) -> Table:
    """One row a layer: signal-to-noise of each part, and how often the candidate chooses the same experts."""
    insides = candidate.insides
    assert insides is not None
    rows = [
        (
            str(layer.layer),
            _decibels(layer.attention),
            _decibels(layer.feed_forward),
            _decibels(worst_answer(layer)),
            _decibels(layer.after),
            UNKNOWN if layer.router_agreement is None else percent(layer.router_agreement),
            UNKNOWN if layer.expert_coverage is None else percent(layer.expert_coverage),
        )
        for layer in insides.layers
    ]
    return Table(columns=LAYER_COLUMNS, rows=rows)


def worst_answer(layer: LayerFidelity) -> Fidelity | None:
    """Of the expert whose answers are furthest off, among those that both builds send tokens to."""
    return min((e.answer for e in layer.experts if e.both), key=lambda a: a.signal_to_noise, default=None)


def experts_table(insides: LayerByLayer) -> Table:
    """The experts whose answers are furthest off, the worst first."""
    found = [(layer.layer, expert) for layer in insides.layers for expert in layer.experts if expert.both]
    rows = [
        (str(layer), str(e.expert), f"{e.tokens:,}", _decibels(e.answer), f"{e.answer.gain:.3f}")
        for layer, e in sorted(found, key=lambda pair: pair[1].answer.signal_to_noise)[:NOISIEST]
    ]
    return Table(columns=EXPERT_COLUMNS, rows=rows)


def tasks_table(report: Report) -> Table:
    """One row a task, metric and build, with what is published of the model where something is."""
    rows = [
        (
            score.task,
            score.metric,
            score.build,
            percent(score.value, score.stderr),
            UNKNOWN if score.published is None else percent(score.published),
            f"{score.documents:,}",
        )
        for score in sorted(report.tasks, key=lambda score: (score.task, score.metric))
    ]
    return Table(columns=TASK_COLUMNS, rows=rows)


def tasks_remark() -> str:
    """What published scores are worth, and of which benchmarks there is no task here."""
    from corral.validate.published import lacking

    missing = "; ".join(f"{titles} ({why})" for why, titles in lacking().items())
    return (
        "Published scores come from other prompts, and others' reading of the answers: hold builds against each other. "
        f"Published, and not measured here: {missing}."
    )


def verdict_words(candidate: CandidateResult) -> str:
    """What is broken of a candidate that was looked into."""
    return f"broken: {candidate.verdict}" if candidate.verdict else "nothing is broken"


def _show_insides(report: Report) -> None:
    for candidate in report.candidates:
        if candidate.insides is None:
            continue
        click.echo(
            f"\n   {candidate.name}, layer by layer: signal-to-noise in dB, on {candidate.insides.tokens:,} tokens"
        )
        print_table(layers_table(candidate))
        click.echo(f"   {verdict_words(candidate)}")


def _decibels(fidelity: Fidelity | None) -> str:
    return UNKNOWN if fidelity is None else f"{fidelity.signal_to_noise:.1f}"


def _speed(latency: Latency | None) -> tuple[str, str]:
    if latency is None:
        return UNKNOWN, UNKNOWN
    speed, first = latency.tokens_per_second, latency.time_to_first_token
    return (
        f"{speed.median:.0f} ({speed.min:.0f}{DASH}{speed.max:.0f})",
        seconds_range(first.median, first.min, first.max),
    )
