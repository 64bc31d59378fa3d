"""What tuning chose, as a table, and as the text of a recipe file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from corral.cli.formats import UNKNOWN, counted, size
from corral.cli.tables import Table, print_table

if TYPE_CHECKING:
    from corral.spec.rule import Rule
    from corral.tune.tuned import Tried, Tuned


def show_tuned(tuned: Tuned, checkpoint: Path, out: Path) -> None:
    """Say what was chosen for each part, what it costs together, where it is written, and what comes next."""
    print_table(tuned_table(tuned))
    click.echo("\n" + "".join(f"   {line}\n" for line in _in_words(tuned)))
    click.echo(f"   {out}\n   next: corral compile {checkpoint} -o OUT --recipe {out}")


def tuned_table(tuned: Tuned) -> Table:
    """One row a part."""
    rows = [
        (one.part.pattern, str(one.choice), f"{one.kl:.1e}", size(one.bytes), _next_best(one, tuned))
        for one in tuned.chosen
    ]
    return Table(columns=("matrices", "stored", "KL, nats>", "size>", "KL one step smaller>"), rows=rows)


def written(tuned: Tuned, budget: Mapping[str, Any]) -> str:
    """The recipe file: how it came about, then its keys and rules, each with what its matrices cost."""
    from corral.tune.recipe_file import recipe_text

    head = [f"Chosen by corral tune for a {budget['what']} budget of {budget['limit']:.10g}.", *_in_words(tuned)]
    return recipe_text(tuned.recipe, head=head, remarks=[_remark(rule, tuned) for rule in tuned.recipe.rules])


def _in_words(tuned: Tuned) -> list[str]:
    speed = f", about {tuned.tokens_per_second:.0f} tokens a second" if tuned.tokens_per_second else ""
    return [
        f"KL of the weights together: {tuned.kl:.4f} nats a token, on {tuned.tokens:,} tokens of {tuned.text}",
        f"(the parts one by one add up to {tuned.sum_of_parts:.4f}). The bundle: {size(tuned.bytes)}{speed}.",
    ]


def _next_best(one: Tried, tuned: Tuned) -> str:
    """What the same part would cost in the next smaller storage."""
    smaller = [other for other in tuned.tried if other.part == one.part and other.bytes < one.bytes]
    if not smaller:
        return UNKNOWN
    most = max(other.bytes for other in smaller)
    return f"{min(other.kl for other in smaller if other.bytes == most):.1e}"


def _last_rule(tuned: Tuned, one: Tried) -> Rule | None:
    """The rule that decides about a part."""
    matching = [rule for rule in tuned.recipe.rules if rule.matches(one.part.parameters[0])]
    return matching[-1] if matching else None


def _remark(rule: Rule, tuned: Tuned) -> str:
    ruled = [one for one in tuned.chosen if _last_rule(tuned, one) is rule]
    parts = f" in {counted(len(ruled), 'layer')}" if len(ruled) > 1 else ""
    return f"KL {sum(one.kl for one in ruled):.1e}, {size(sum(one.bytes for one in ruled))}{parts}"
