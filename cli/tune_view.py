"""What tuning chose, as a table, and as the text of a recipe file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from corral.cli.formats import UNKNOWN, counted, size
from corral.cli.tables import Table, print_table
from corral.spec.quant_scheme import scheme_named

if TYPE_CHECKING:
    from collections.abc import Sequence

    from corral.spec.rule import Rule
    from corral.tune.tuned import Tried, Tuned


def show_tuned(tuned: Tuned, checkpoint: Path, out: Path) -> None:
    """Say what was chosen for each part, what it costs together, where it is written, and what comes next."""
    print_table(tuned_table(tuned))
    click.echo("\n" + "".join(f"   {line}\n" for line in _in_words(tuned)))
    following = shlex.join(["corral", "compile", str(checkpoint), "-o", "OUT", "--recipe", str(out)])
    click.echo(f"   written to {out}, to read and to edit\n   next: {following}")


def tuned_table(tuned: Tuned) -> Table:
    """One row a part."""
    rows = [
        (one.part.pattern, _stored(one), _kl(one.kl), size(one.bytes), _next_best(one, tuned)) for one in tuned.chosen
    ]
    return Table(columns=("matrices", "stored", "KL, nats>", "size>", "KL one step smaller>"), rows=rows)


def written(tuned: Tuned) -> str:
    """The recipe file: how it came about, then its keys and rules, each with what its matrices cost."""
    from corral.tune.recipe_file import recipe_text

    ruled: dict[Rule | None, list[Tried]] = {None: []}
    for one in tuned.chosen:
        ruled.setdefault(_last_rule(tuned, one), []).append(one)
    rest = [one for one in ruled[None] if not one.part.is_table]
    so = f"So is stored what no rule names: {_cost(rest, 'part')}" if rest else "Rules name every matrix"
    published = "; the embedding is as published" if len(rest) < len(ruled[None]) else ""
    return recipe_text(
        tuned.recipe,
        head=[f"Chosen by corral tune for {tuned.budget}.", *_in_words(tuned)],
        rest=f"{so}{published}. Of rules that name the same, the last one counts.",
        remarks=[_cost(ruled[rule], "layer") for rule in tuned.recipe.rules],
    )


def _in_words(tuned: Tuned) -> list[str]:
    words = [
        f"KL of the weights together: {tuned.kl:#.2g} nats a token, on {tuned.tokens:,} tokens of {tuned.text}",
        f"(the parts one by one add up to {tuned.sum_of_parts:#.2g}). The bundle: {tuned.bytes:,} bytes.",
    ]
    if speed := tuned.tokens_per_second:
        words.append(f"A build stored so decodes {tuned.budget.repeated(speed)} on this machine.")
        if speed.median < tuned.budget.limit:
            words.append(
                f"That misses the budget, {tuned.budget}, which it kept when it was chosen: tune when the machine is quiet, or "
                "ask for more."
            )
    return words


def _stored(one: Tried) -> str:
    as_published = one.part.is_table and not scheme_named(one.choice.weights).is_quantized
    return "as published" if as_published else str(one.choice)


def _kl(nats: float) -> str:
    return f"{nats:.1e}" if nats else "0"


def _cost(together: Sequence[Tried], noun: str) -> str:
    several = f" in {counted(len(together), noun)}" if len(together) != 1 else ""
    return f"KL {_kl(sum(one.kl for one in together))}, {size(sum(one.bytes for one in together))}{several}"


def _next_best(one: Tried, tuned: Tuned) -> str:
    """What the same part would cost in the next smaller storage."""
    smaller = [other for other in tuned.tried if other.part == one.part and other.bytes < one.bytes]
    if not smaller:
        return UNKNOWN
    most = max(other.bytes for other in smaller)
    return _kl(min(other.kl for other in smaller if other.bytes == most))


def _last_rule(tuned: Tuned, one: Tried) -> Rule | None:
    """The rule that decides about a part."""
    matching = [rule for rule in tuned.recipe.rules if rule.matches(one.part.parameters[0])]
    return matching[-1] if matching else None
