"""A choice for every part -> a recipe, and the file that a person can read, edit and compile."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from corral.spec.quant_scheme import scheme_named
from corral.spec.recipe import Recipe, rules_toml
from corral.spec.rule import Rule
from corral.tune.choice import Choice
from corral.tune.parts import Part


def as_recipe(recipe: Recipe, chosen: Mapping[Part, Choice]) -> Recipe:
    """`recipe` with the most frequent choice as its own, and a rule for what differs: for a kind of part, or for one part.

    What corral's kernels do not compute cannot be the recipe's own; the embedding has a rule of its own or is as published.
    """
    matrices = [choice for part, choice in chosen.items() if not part.is_table]
    quantized = [one for one in matrices if scheme_named(one.weights).is_quantized]
    base = _most_frequent((quantized if recipe.kernels == "corral" else matrices) or matrices)
    rules = []
    for kind in dict.fromkeys(part.kind for part in chosen):
        alike = {part: choice for part, choice in chosen.items() if part.kind == kind and not part.is_table}
        if not alike:
            continue
        usual = _most_frequent(alike.values())
        if list(alike.values()).count(usual) == 1:
            usual = base  # a line for all of a kind that holds for one says nothing
        if usual != base:
            rules.append(_rule(kind, usual))
        rules += [_rule(part.pattern, choice) for part, choice in alike.items() if choice != usual]
    tables = [(part, choice) for part, choice in chosen.items() if part.is_table]
    rules += [_rule(part.pattern, choice) for part, choice in tables if scheme_named(choice.weights).is_quantized]
    return dataclasses.replace(recipe, **dataclasses.asdict(base), rules=tuple(rules))


def recipe_text(recipe: Recipe, *, head: Sequence[str], rest: str, remarks: Sequence[str]) -> str:
    """TOML, with `head` as comments before, `rest` (of what no rule names) before the rules, and a remark behind each."""
    rules = recipe.to_json()["rules"]
    comments = "".join(f"# {line}\n" for line in head)
    keys = dataclasses.replace(recipe, rules=()).to_toml()
    return f"{comments}\n{keys}\n# {rest}\n" + (rules_toml(rules, remarks) if rules else "")


def _rule(pattern: str, choice: Choice) -> Rule:
    """All that a choice says, though some of it may hold already: a line is then read by itself."""
    if not scheme_named(choice.weights).is_quantized:
        return Rule(matrices=pattern, weights=choice.weights)
    return Rule(matrices=pattern, **dataclasses.asdict(choice))


def _most_frequent(choices: Collection[Choice]) -> Choice:
    return Counter(choices).most_common(1)[0][0]
