"""The options that `corral run` and `corral chat` open a bundle with."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from corral.cli.options import F, provider_option, threads_option

if TYPE_CHECKING:
    from corral.runtime import LLM

OPTIONS = {
    "prompt_lookup": click.option(
        "--prompt-lookup", is_flag=True, help="Guess next tokens where the same ones stood before."
    ),
    "draft": click.option(
        "--draft", type=click.Path(path_type=Path), help="Let this smaller bundle guess next tokens."
    ),
    "num_speculative_tokens": click.option(
        "--speculative-tokens",
        "num_speculative_tokens",
        type=int,
        help="Tokens guessed at a time.  [default: 8 looked up, 5 drafted]",
    ),
    "prefix_cache_gb": click.option(
        "--prefix-cache-gb",
        type=float,
        default=4.0,
        show_default=True,
        help="Memory for beginnings of prompts; 0: none.",
    ),
    "provider": provider_option,
    "threads": threads_option,
}


def opening_options(command: F) -> F:
    """Gives the command `opening`: keywords of LLM."""

    @functools.wraps(command)
    def gathered(**options: Any) -> Any:
        opening = {name: options.pop(name) for name in OPTIONS}
        return command(**options, opening=opening)

    with_options: Any = gathered
    for option in reversed(OPTIONS.values()):
        with_options = option(with_options)
    return with_options


def opened(bundle: Path, opening: dict[str, Any]) -> LLM:
    """The bundle, ready to write; shows how far it has come."""
    from corral.cli.progress import show_progress
    from corral.runtime import LLM

    with show_progress() as progress:
        return LLM(bundle, **opening, progress=progress)
