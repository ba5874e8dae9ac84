"""The entry point: commands by name, loaded when they are used; errors as one line."""

from __future__ import annotations

import codecs
import io
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from contextvars import copy_context
from importlib import import_module, metadata
from typing import Any, final

import click

from softprompt.errors import SoftPromptError, TrainingInterrupted, UsageError, line, nearest
from softprompt.world import joined, launched

GROUPS = {
    "Train": ("demo", "tune", "sweep", "distill", "runs", "sources", "compose"),
    "Evaluate": ("evaluate", "compare"),
    "Use": ("generate", "classify", "chat", "serve"),
    "Share": ("push", "pull", "convert"),
    "Inspect": ("info", "inspect", "similar"),
    "Shell": ("completion",),
}
"""The commands by what they are for, in the order of a prompt's life; each is a module of this folder."""
COMMANDS = tuple(name for names in GROUPS.values() for name in names)
SHARED = ("tune", "sweep", "distill", "evaluate", "compare", "generate", "classify")
"""Commands whose work the processes of a launcher (torchrun) share."""
INTERRUPTED = 130

_ESCAPED = "softprompt-escaped"
"""Name of the rule for characters that stdout cannot encode."""


@final
class Commands(click.Group):
    """Commands that live in a module of their own, imported when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of a prompt's life."""
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, group by group."""
        for title, names in GROUPS.items():
            found = {name: self.get_command(ctx, name) for name in names}
            with formatter.section(title):
                width = formatter.width - 6 - max(map(len, COMMANDS))
                formatter.write_dl(
                    [(name, each.get_short_help_str(width)) for name, each in found.items() if each is not None],
                    col_max=max(map(len, COMMANDS)),
                )

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; its errors are put into the words of the command line."""
        try:
            return super().invoke(ctx)
        except SoftPromptError as error:
            error.args = (ctx.meta.get("softprompt.worded", str)(str(error)),)
            raise

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command; a name that does not exist fails, naming the nearest."""
        if cmd_name not in COMMANDS and ctx.resilient_parsing:  # a shell asks for completions
            return None
        if cmd_name not in COMMANDS:
            known = ", ".join(COMMANDS)
            ctx.fail(f"no command {cmd_name!r}{nearest(cmd_name, COMMANDS)}; there are {known}")
        command: click.Command = import_module(f"softprompt.cli.{cmd_name}").command
        return command


def _version() -> str:
    try:
        return metadata.version("softprompt")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "(not installed)"


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), message="softprompt %(version)s")
def cli() -> None:
    """Tune soft prompts for frozen language models, evaluate them, and use them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 2 for an error, or 130 after Ctrl-C."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_ESCAPED)
    try:
        # What a command sets for its own time, such as silence, ends with it.
        result: Any = copy_context().run(_shared, words or ["--help"])
    except click.ClickException as error:
        return _say(f"Error: {error.format_message()}", error.exit_code)
    except TrainingInterrupted as error:
        return _say(str(error), INTERRUPTED)
    except (click.Abort, KeyboardInterrupt):
        return _say("interrupted", INTERRUPTED)
    except SoftPromptError as error:
        return _say(f"Error: {error}", 2)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder that may not be written to
        return _say(f"Error: {error}", 2)
    return result if isinstance(result, int) else 0


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Return characters that the encoding of stdout lacks as escapes of JSON, which reads them back."""
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)), error.end


codecs.register_error(_ESCAPED, _escaped)


def _shared(words: list[str]) -> Any:
    """Run the words of a command line, in each of the processes of a launcher, of which the first alone speaks.

    Raises:
        UsageError: It started several for a command that is for one.
    """
    ranks = launched()
    if ranks.size > 1 and words[0] not in SHARED:
        if not ranks.is_main:
            return 2
        raise UsageError(
            f"{words[0]} runs in one process, {', '.join(SHARED)} in several; start it without torchrun"
        )
    with ExitStack() as stack:
        if ranks.size > 1 and not ranks.is_main:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
            stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(joined())
        return cli.main(words, "softprompt", standalone_mode=False)


def _say(message: str, code: int) -> int:
    ranks = launched()
    if not ranks.speaks():
        return code
    if not ranks.is_main:
        message = f"rank {ranks.rank} of {ranks.size}: {message}"
    click.echo(line(message), err=True)
    return code
