"""Tokens per second of choices, by builds that are compiled for it and decode by turns."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from corral.graphs.compiler import compile
from corral.spec.progress import Progress, silent
from corral.spec.recipe import Recipe
from corral.spec.target import target_named
from corral.tune.choice import Choice
from corral.tune.parts import Part
from corral.tune.recipe_file import as_recipe
from corral.validate.build import open_build
from corral.validate.latency import measure_latency
from corral.validate.statistics import Spread

Chosen = Mapping[Part, Choice]
# Tokens per second of a build of each choice, one sequence at a time.
Timer = Callable[[Sequence[Chosen]], list[Spread]]

REPEATS = 15


@dataclass(frozen=True, kw_only=True)
class BuildTimer:
    """A `Timer` that compiles the choices into the temporary directory and lets the builds decode by turns.

    Codes are rounded to nearest whatever the method: speed hangs on how weights are stored, not on which codes they have.
    """

    checkpoint: Path
    recipe: Recipe
    prompt: Sequence[int]
    threads: int | None = None
    progress: Progress = silent

    def __call__(self, choices: Sequence[Chosen]) -> list[Spread]:
        provider = target_named(self.recipe.target).provider
        with tempfile.TemporaryDirectory(prefix="corral-") as scratch:
            builds = []
            for i, chosen in enumerate(choices):
                self.progress("compile", i, len(choices), "builds to time")
                plain = {part: dataclasses.replace(choice, method="rtn") for part, choice in chosen.items()}
                made = compile(self.checkpoint, Path(scratch) / str(i), as_recipe(self.recipe, plain))
                builds.append(open_build(made.directory, provider=provider, threads=self.threads))
            found = measure_latency(builds, self.prompt, repeats=REPEATS, progress=self.progress)
        return [latency.tokens_per_second for latency in found if latency]
