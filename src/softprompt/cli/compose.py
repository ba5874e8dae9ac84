"""``softprompt compose``: new prompts from old ones."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.options import (
    Command,
    option,
    output_options,
    show,
    start_logging,
    table,
    together,
    write_options,
)

if TYPE_CHECKING:
    from softprompt.artifacts import StoredPrompt


@click.group("compose", no_args_is_help=False)
def command() -> None:
    """Make a new prompt from prompts of the same base.

    The result records what it was made of, and no metrics: evaluate it.
    """


_composition = partial(option, group="Composition")
_result_options = together(
    write_options,
    option(
        "--template-from",
        metavar="PROMPT_DIR",
        group="Output",
        help="Prompt whose template, labels, limits and dtype the result gets, where they differ.",
    ),
    output_options,
)


@command.command("average", cls=Command)
@click.argument("prompt_dirs", nargs=-1, required=True)
@_composition(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    help="Weight of a prompt, once for each in their order; by default equal.  [repeatable]",
)
@_composition("--num-virtual-tokens", type=int, help="Resize all prompts to this length first.")
@_result_options
def average(
    *, prompt_dirs: tuple[str, ...], weights: tuple[float, ...], quiet: bool, as_json: bool, **options: Any
) -> None:
    """Average prompts of one length, virtual token by virtual token."""
    start_logging(quiet=quiet)
    from softprompt.artifacts import average_prompts

    made = average_prompts(prompt_dirs, weights=weights or None, **options)
    _show(made, as_json)


@command.command("concat", cls=Command)
@click.argument("prompt_dirs", nargs=-1, required=True)
@_result_options
def concat(*, prompt_dirs: tuple[str, ...], quiet: bool, as_json: bool, **options: Any) -> None:
    """Concatenate the virtual tokens of prompts."""
    start_logging(quiet=quiet)
    from softprompt.artifacts import concatenate_prompts

    _show(concatenate_prompts(prompt_dirs, **options), as_json)


@command.command("difference", cls=Command)
@click.argument("first")
@click.argument("second")
@_composition("--onto", metavar="PROMPT_DIR", help="Prompt to add the difference to.")
@_composition("--scale", type=float, default=1.0, show_default=True, help="Scale of the difference.")
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
        "made of": manifest and ", ".join(each["prompt"] for each in manifest.data["made_of"].values()),
    }
    show(result, table(rows), as_json=as_json)
