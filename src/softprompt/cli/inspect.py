"""``softprompt inspect``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from softprompt.cli.inputs import recorded_data
from softprompt.cli.options import (
    Command,
    base_options,
    given,
    option,
    output_options,
    overwrite_option,
    say,
    show,
    start_logging,
)
from softprompt.errors import UsageError

_data, _base = partial(option, group="Data"), partial(option, group="Base model")


@click.command("inspect", cls=Command)
@click.argument("prompt_dir")
@option("--against", multiple=True, group="Inspection", help="Prompt to set it against.  [repeatable]")
@option("--nearest", type=int, group="Inspection", help="Nearest tokens of each virtual token.  [default: 5]")
@option("--task-name", group="Inspection", help="Task of a multitask prompt, by name or number.")
@_data(
    "--data", type=click.Path(), help="Records with targets; by default the validation data, or else training data."
)
@_data("--limit", type=int, help="Records to look at, evenly spaced over the data.  [default: 64]")
@_data("--batch-size", type=int, help="Batch size.  [default: 32]")
@_base(
    "--no-base",
    "--without-base",
    "no_base",
    is_flag=True,
    help="Do not load the base model: what the artifact alone can say.",
)
@base_options
@option(
    "--output", type=click.Path(), group="Output", help="Directory for the numbers, figures and an HTML report."
)
@overwrite_option
@output_options
def command(
    *,
    prompt_dir: str,
    data: str | None,
    no_base: bool,
    output: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Show what a prompt learned: values, training, and what it does on records.

    Nearest vocabulary tokens, norms, similarity and drift; with its base and records attention to the prompt by
    layer, the loss without each virtual token, records won and lost against zero-shot and other prompts, and the
    prompt in words. What is not there is named, with the reason. `info` is the short form.
    """
    start_logging(quiet=quiet)
    from softprompt.artifacts import require_empty
    from softprompt.inspection import inspect_prompt, write_report

    if output is not None:
        require_empty(Path(output), overwrite=overwrite)
    elif overwrite:
        raise UsageError("--overwrite would be ignored without --output; leave it out")
    if no_base and (data is not None or options["base_model"] is not None):
        raise UsageError("--no-base leaves --data and --base-model unused; leave it out, or these")
    if data is None and not no_base and (data := recorded_data(prompt_dir)) and not quiet:
        say(f"records of {data}, which the prompt was made with; name others by --data")
    found = inspect_prompt(prompt_dir, data, with_base=not no_base, silence_progress_bars=quiet, **given(options))
    if output is not None:
        write_report(found, output, overwrite=overwrite)
        say(f"written: {output}")
    show(found.to_dict(), str(found), as_json=as_json)
