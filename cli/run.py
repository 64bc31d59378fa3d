"""`corral run`: one prompt, its completion as it comes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from corral.cli.options import chosen_sampling, json_option, provider_option, sampling_options, threads_option


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option(
    "--chat/--raw", default=False, help="Put PROMPT through the chat template, or complete it as it is (default)."
)
@sampling_options(temperature=0.0)
@provider_option
@threads_option
@json_option
def command(
    bundle: Path, prompt: str, chat: bool, provider: str, threads: int | None, as_json: bool, **sampling: Any
) -> None:
    """Complete PROMPT ("-" reads it from stdin) with a BUNDLE."""
    params = chosen_sampling(sampling)
    from corral.cli.progress import show_progress
    from corral.cli.tables import print_json
    from corral.runtime import LLM

    text = sys.stdin.read() if prompt == "-" else prompt
    with show_progress() as progress:
        llm = LLM(bundle, provider=provider, threads=threads, progress=progress)
    messages = [{"role": "user", "content": text}]
    if as_json:
        completion = (llm.chat(messages, params) if chat else llm.generate([text], params))[0]
        print_json({"prompt": text, **dataclasses.asdict(completion)})
        return
    for piece in llm.chat_stream(messages, params) if chat else llm.stream(text, params):
        click.echo(piece.text, nl=False)
    click.echo()
