"""``softprompt compose``: new prompts from old ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from softprompt.cli.options import output_options
from softprompt.cli.streams import show, start_logging, table

if TYPE_CHECKING:
    from softprompt.artifacts import StoredPrompt

Command = TypeVar("Command", bound=Callable[..., Any])


@click.group("compose", no_args_is_help=False)
def command() -> None:
    """Make a new prompt from prompts of the same base.

    The result records what it was made of, and no metrics: evaluate it.
    """


def _result_options(function: Command) -> Command:
    """Add what every composition has."""
    function = output_options(function)
    function = click.option(
        "--overwrite", is_flag=True, help="Write into an output directory that is not empty."
    )(function)
    function = click.option(
        "--template-from",
        metavar="PROMPT_DIR",
        help="The prompt whose template, labels, limits and dtype the result gets, where they differ.",
    )(function)
    return click.option(
        "--output", required=True, type=click.Path(), help="Directory to write the prompt to."
    )(function)


@command.command("average")
@click.argument("prompt_dirs", nargs=-1, required=True)
@click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    help="Weight of a prompt, once for each in their order; by default all weigh the same.",
)
@click.option("--num-virtual-tokens", type=int, help="Resize all prompts to this length first.")
@_result_options
def average(
    *,
    prompt_dirs: tuple[str, ...],
    weights: tuple[float, ...],
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Average prompts of one length, row by row."""
    start_logging(quiet=quiet)
    from softprompt.artifacts import average_prompts

    made = average_prompts(prompt_dirs, weights=weights or None, **options)
    _show(made, as_json)


@command.command("concat")
@click.argument("prompt_dirs", nargs=-1, required=True)
@_result_options
def concat(*, prompt_dirs: tuple[str, ...], quiet: bool, as_json: bool, **options: Any) -> None:
    """Put the rows of prompts one after the other."""
    start_logging(quiet=quiet)
    from softprompt.artifacts import concatenate_prompts

    _show(concatenate_prompts(prompt_dirs, **options), as_json)


@command.command("difference")
@click.argument("first")
@click.argument("second")
@click.option("--onto", metavar="PROMPT_DIR", help="Prompt to add the difference to.")
@click.option(
    "--scale", type=float, default=1.0, show_default=True, help="Factor of the difference."
)
@_result_options
def difference(*, first: str, second: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Write scale * (FIRST - SECOND), added to a third prompt with --onto."""
    start_logging(quiet=quiet)
    from softprompt.artifacts import subtract_prompts

    _show(subtract_prompts(first, second, **options), as_json)


def _show(made: StoredPrompt, as_json: bool) -> None:
    manifest = made.manifest
    result = {
        "output": made.location,
        "virtual_tokens": made.config["num_virtual_tokens"],
        "composition": manifest and manifest.settings["composition"],
        "made_of": manifest and manifest.data["made_of"],
    }
    rows = {
        "output": made.location,
        "virtual tokens": made.config["num_virtual_tokens"],
        "made of": manifest
        and ", ".join(each["prompt"] for each in manifest.data["made_of"].values()),
    }
    show(result, table(rows), as_json=as_json)
