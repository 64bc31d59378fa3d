"""`corral validate`: what builds lost against a reference, and how fast they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from corral.cli.options import command_line, json_option, provider_option, threads_option
from corral.spec.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from corral.validate.tasks import TaskScore

path_type = click.Path(path_type=Path)


@click.command("validate")
@click.argument("reference", type=path_type)
@click.argument("candidates", type=path_type, nargs=-1, required=True, metavar="CANDIDATE...")
@click.option(
    "--text", "texts", type=path_type, multiple=True, help="UTF-8 text to measure on (may be given several times)."
)
@click.option("--token-ids", type=path_type, help="Token ids instead of a text: .npy, or a JSON list.")
@click.option("--tokens", type=int, default=20_000, show_default=True, help="Score at most as many predictions.")
@click.option(
    "--window", type=int, default=512, show_default=True, help="Tokens a window; each starts without context."
)
@click.option("--repeats", type=int, default=5, show_default=True, help="Timed runs a build.")
@click.option("--inside", is_flag=True, help="Also compare layer by layer, expert by expert, and name what is broken.")
@click.option(
    "--tasks", metavar="NAME[,NAME]", help="Also run these tasks of lm-eval, or llama4: those with published scores."
)
@click.option("--task-limit", type=int, help="Of each task, only so many documents.")
@click.option(
    "--task-chat", is_flag=True, help="Put a task's questions through the chat template, as Instruct models want."
)
@click.option("--max-kl", type=float, help="Gate: mean KL divergence, nats a token.")
@click.option("--min-top1", type=float, help="Gate: share of tokens with the same top-1, 0 to 1.")
@click.option("--max-perplexity-ratio", type=float, help="Gate: perplexity over the reference's.")
@click.option(
    "--html",
    "page",
    type=path_type,
    help="Also write it as a page to this file: with pictures and recipes, complete by itself.",
)
@provider_option
@threads_option
@json_option
def command(
    reference: Path,
    candidates: tuple[Path, ...],
    texts: tuple[Path, ...],
    token_ids: Path | None,
    tokens: int,
    window: int,
    repeats: int,
    inside: bool,
    tasks: str | None,
    task_limit: int | None,
    task_chat: bool,
    page: Path | None,
    provider: str,
    threads: int | None,
    as_json: bool,
    **gates: float | None,
) -> None:
    """Compare CANDIDATE bundles with a REFERENCE: a checkpoint (run in PyTorch) or a bundle.

    A broken gate ends with exit code 1.
    """
    if page is not None:
        from corral.cli.report_page import check_page

        check_page(page)  # before hours of work
    if bool(texts) == (token_ids is not None):
        got = "both" if texts else "neither"
        raise InputError(f"expected --text FILE or --token-ids FILE, got {got}. Give one of them.")
    if task_limit is not None and task_limit < 1:
        raise InputError(f"task_limit is {task_limit}, expected at least 1.")
    from corral.cli.progress import show_progress
    from corral.cli.report_view import show_report
    from corral.cli.tables import print_json
    from corral.validate import compare
    from corral.validate.gates import check_gates
    from corral.validate.windows import read_text, read_token_ids

    with show_progress() as progress:
        scores: tuple[TaskScore, ...] = ()
        if tasks is not None:  # first: what cannot be fetched is told before hours of work
            progress("load tasks", 0, 0, "")
            from corral.validate.tasks import Tasks, run_tasks

            how = {"limit": task_limit, "chat": task_chat, "provider": provider, "threads": threads}
            scores = run_tasks(Tasks(tasks.split(",")), [reference, *candidates], progress=progress, **how)
        report = compare(
            reference,
            candidates,
            [read_text(text) for text in texts],
            token_ids=read_token_ids(token_ids) if token_ids else None,
            predictions=tokens,
            window=window,
            repeats=repeats,
            inside=inside,
            provider=provider,
            threads=threads,
            progress=progress,
        )
    report = dataclasses.replace(report, tasks=scores)
    if as_json:
        print_json(report.to_json())
    else:
        show_report(report)
    try:
        check_gates(report, gates)
        failed = None
    except CheckFailed as error:
        failed = error
    if page is not None:
        from corral.cli.report_page import write_page

        written = write_page(page, report, candidates, command_line(click.get_current_context()), failed)
        click.echo(f"   {written}", err=as_json)
    if failed is not None:
        raise failed
