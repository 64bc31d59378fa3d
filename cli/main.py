"""`corral`: the list of commands, loaded only when named, and the one place where errors become words and exit codes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

import click

from corral.cli.failure import INTERRUPTED, Failure, explain, show

# In the order of --help: the way of a model first, then its stages one by one, then helpers. One module each, which
# holds a `command`.
COMMANDS = (
    "plan",
    "compile",
    "run",
    "chat",
    "validate",
    "tune",
    "inspect",
    "doctor",
    "demo",
    "export",
    "quantize",
    "lower",
    "build",
    "completion",
)


class Corral(click.Group):
    """A group that imports a command's module when the command is asked for, and ends with corral's exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"corral.cli.{cmd_name}").command
        return command

    def main(
        self, args: Sequence[str] | None = None, prog_name: str | None = None, *more: Any, **options: Any
    ) -> NoReturn:
        """Run and exit: 0 done, 1 a gate or check said no, 2 the user's input, 3 the environment, 130 Ctrl-C."""
        if not (sys.argv[1:] if args is None else args):
            args = ["--help"]
        try:
            # Not click's own ending: it knows two exit codes, and would show an interrupt as "Aborted!".
            code = super().main(args, prog_name or "corral", *more, **{**options, "standalone_mode": False})
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read has enough (`corral … | head`); the interpreter must not complain when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except (click.Abort, KeyboardInterrupt) as stop:
            # click hides the interrupt, and what it says of the work done until then, behind an Abort.
            words = str(stop.__cause__ if isinstance(stop, click.Abort) else stop)
            code = show(Failure(words if " " in words else "stopped by Ctrl-C.", INTERRUPTED), prefix="")
        except Exception as error:
            failure = explain(error)
            if failure is None:
                raise  # a defect of corral: the traceback is what its report needs
            code = show(failure)
        sys.exit(code if isinstance(code, int) else 0)


def _show_version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        try:
            click.echo(f"corral {version('corral')}")
        except PackageNotFoundError:
            click.echo("corral, not installed")
        ctx.exit()


@click.group(
    "corral",
    cls=Corral,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="First minutes: `corral demo`. What this machine can do: `corral doctor`.",
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Show it.")
def main() -> None:
    """Compile Llama 4 checkpoints, run them, and measure what the compression cost."""


if __name__ == "__main__":
    main()
