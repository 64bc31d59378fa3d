"""`corral completion`: the shell code that completes corral's commands and options."""

from __future__ import annotations

import click

# Where each shell looks for it.
INSTALL = {
    "bash": 'eval "$(corral completion bash)"   in ~/.bashrc',
    "zsh": 'eval "$(corral completion zsh)"   in ~/.zshrc, after compinit',
    "fish": "corral completion fish > ~/.config/fish/completions/corral.fish",
}


@click.command("completion", epilog="\b\n" + "\n".join(INSTALL.values()))
@click.argument("shell", type=click.Choice(tuple(INSTALL)))
def command(shell: str) -> None:
    """Print completion for SHELL: bash, zsh or fish."""
    from click.shell_completion import get_completion_class

    from corral.cli.main import main

    kind = get_completion_class(shell)
    assert kind is not None, shell
    click.echo(kind(main, {}, "corral", "_CORRAL_COMPLETE").source())
