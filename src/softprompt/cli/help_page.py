"""docs/cli.md, made from the help texts: ``python -m softprompt.cli.help_page > docs/cli.md``."""

from __future__ import annotations

import click

from softprompt.cli.main import COMMANDS, cli

WIDTH = 100

INTRODUCTION = """# The command line

Made from the help texts by `python -m softprompt.cli.help_page > docs/cli.md`; a test compares.

Results go to stdout, everything else to stderr. With `--json` stdout holds one JSON object and
nothing else. Exit codes: 0 done, 2 an error (one line on stderr), 130 after Ctrl-C; an interrupted
`tune` prints the command that continues it.
"""


def help_page() -> str:
    """Return the page."""
    context = click.Context(
        cli, info_name="softprompt", terminal_width=WIDTH, help_option_names=["-h", "--help"]
    )
    parts = [INTRODUCTION, _section("softprompt", cli, context)]
    for name in COMMANDS:
        command = cli.get_command(context, name)
        if command is not None:
            child = click.Context(command, info_name=name, parent=context, terminal_width=WIDTH)
            parts.append(_section(f"softprompt {name}", command, child))
            parts += _below(f"softprompt {name}", command, child)
    return "\n".join(parts)


def _below(title: str, command: click.Command, context: click.Context) -> list[str]:
    """Return the sections of the commands inside a group."""
    if not isinstance(command, click.Group):
        return []
    return [
        _section(
            f"{title} {name}",
            inner,
            click.Context(inner, info_name=name, parent=context, terminal_width=WIDTH),
        )
        for name, inner in command.commands.items()
    ]


def _section(title: str, command: click.Command, context: click.Context) -> str:
    return f"## {title}\n\n```text\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    click.echo(help_page(), nl=False)
