"""``softprompt completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from softprompt.cli.options import Command

SHELLS = ("bash", "zsh", "fish")


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the script that completes commands, options and their values in a shell.

    \b
    bash:  echo 'eval "$(softprompt completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(softprompt completion zsh)"' >> ~/.zshrc
    fish:  softprompt completion fish > ~/.config/fish/completions/softprompt.fish
    """  # noqa: D301 - the escape is click's, for lines that are not filled
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(context.find_root().command, {}, "softprompt", "_SOFTPROMPT_COMPLETE").source())
