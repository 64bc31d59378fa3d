"""`corral chat`: a conversation, line by line; on a pipe, each line is a turn."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from corral.cli.opened import opened, opening_options
from corral.cli.options import chosen_sampling, sampling_options

if TYPE_CHECKING:
    from corral.runtime import LLM, SamplingParams

HELP = "/reset starts over, /exit or Ctrl-D ends, Ctrl-C stops an answer."


@click.command("chat")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--system", help="What the model is told before the conversation.")
@sampling_options(temperature=0.6)
@opening_options
def command(
    bundle: Path,
    system: str | None,
    opening: dict[str, Any],
    **sampling: Any,
) -> None:
    """Talk with a BUNDLE of an instruction-tuned model."""
    params = chosen_sampling(sampling)
    llm = opened(bundle, opening)
    start = [{"role": "system", "content": system}] if system else []
    # A conversation that cannot begin (no tokenizer, no chat template) says so before anybody types.
    llm.chat_stream([*start, {"role": "user", "content": "Hello"}], params)
    messages = list(start)
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(start)
        elif line.startswith("/"):
            click.echo(f"{line.split()[0]} is not known. {HELP}", err=True)
        elif line:
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _answer(llm, messages, params)})


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (importing it gives input() its history and editing)
    click.echo(HELP, err=True)
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ").strip()


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """Print an answer as it comes, and return it; on a terminal, Ctrl-C ends the answer and not the conversation."""
    told: list[str] = []
    try:
        for piece in llm.chat_stream(messages, params):
            told.append(piece.text)
            click.echo(piece.text, nl=False)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    click.echo()
    return "".join(told)
