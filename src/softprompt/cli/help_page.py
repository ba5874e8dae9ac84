"""docs/cli.md, made from the help texts: ``python -m softprompt.cli.help_page > docs/cli.md``."""

from __future__ import annotations

import click

from softprompt.cli.main import cli

WIDTH = 100

INTRODUCTION = """# The command line

Made from the help texts by `python -m softprompt.cli.help_page > docs/cli.md`; a test compares.

Results go to stdout, everything else to stderr. With `--json` stdout holds one JSON object and
nothing else. Exit codes: 0 done, 2 an error (one line on stderr), 130 after Ctrl-C; an interrupted
`tune` prints the command that continues it.
"""


def help_page() -> str:
    """Return the page."""
    context = click.Context(cli, info_name="softprompt", terminal_width=WIDTH, help_option_names=["-h", "--help"])
    return "\n".join([INTRODUCTION, *_sections("softprompt", cli, context)])


def _sections(title: str, command: click.Command, context: click.Context) -> list[str]:
    """Return the help of a command, and of the commands below it."""
    found = [f"## {title}\n\n```text\n{command.get_help(context)}\n```\n"]
    if not isinstance(command, click.Group):
        return found
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        if child is not None:
            below = click.Context(child, info_name=name, parent=context, terminal_width=WIDTH)
            found += _sections(f"{title} {name}", child, below)
    return found


if __name__ == "__main__":
    click.echo(help_page(), nl=False)
