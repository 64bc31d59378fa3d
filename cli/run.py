"""`corral run`: one prompt, its completion as it comes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from corral.cli.opened import opened, opening_options
from corral.cli.options import chosen_sampling, json_option, sampling_options
from corral.cli.written_file import check_place


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option(
    "--chat/--raw", default=False, help="Put PROMPT through the chat template, or complete it as it is (default)."
)
@sampling_options(temperature=0.0)
@opening_options
@click.option(
    "--prefix-cache", type=click.Path(path_type=Path), help="Take the prompt's beginning from FILE, or put it there."
)
@json_option
def command(
    bundle: Path,
    prompt: str,
    chat: bool,
    prefix_cache: Path | None,
    as_json: bool,
    opening: dict[str, Any],
    **sampling: Any,
) -> None:
    """Complete PROMPT ("-" reads it from stdin) with a BUNDLE."""
    params = chosen_sampling(sampling)
    from corral.cli.tables import print_json

    text = sys.stdin.read() if prompt == "-" else prompt
    llm = opened(bundle, opening | ({} if prefix_cache else {"prefix_cache_gb": 0}))
    asked = llm.conversation([{"role": "user", "content": text}]) if chat else text
    new = prefix_cache is not None and not prefix_cache.exists()
    if prefix_cache and new:
        check_place(prefix_cache, "--prefix-cache")
    elif prefix_cache:
        llm.load_prefix(prefix_cache)
    if as_json:
        [completion] = llm.generate([asked], params)
        print_json({"prompt": text, **dataclasses.asdict(completion)})
    else:
        for piece in llm.stream(asked, params):
            click.echo(piece.text, nl=False)
        click.echo()
    if prefix_cache and new and not llm.save_prefix(asked, prefix_cache):
        click.echo(
            f"{prefix_cache} is not written: the prompt is shorter than the 16 tokens that are kept at a time.",
            err=True,
        )
