"""``softprompt generate``."""

from __future__ import annotations

from typing import Any

import click

from softprompt.cli.options import (
    Command,
    base_options,
    generation_options,
    given,
    input_options,
    load_prompts,
    option,
    output_options,
    parts_of,
    request_of,
    show,
    start_logging,
    stdin_lines,
)
from softprompt.generation import GenerationOptions


@click.command("generate", cls=Command)
@click.argument("prompt_dir")
@option("--text", group="Input", help="Input text; without it each line of stdin is an input.")
@input_options
@option("--batch-size", type=int, group="Input", help="Batch size: inputs in one forward pass.")
@generation_options()
@base_options
@output_options
def command(
    *, prompt_dir: str, text: str | None, pairs: tuple[str, ...], as_json: bool, quiet: bool, **options: Any
) -> None:
    """Generate answers to a text, or to each line of stdin.

    With --json the answer to --text is one object; answers to lines are in "results", each with
    the number of its "line". Blank lines have no answer, and a warning says which they are.
    """
    lines = stdin_lines() if text is None and not pairs else None
    requests = [request_of(text, pairs)] if lines is None else list(lines.values())
    GenerationOptions(**parts_of(given(options), GenerationOptions))
    start_logging(quiet=quiet)
    (tuned,) = load_prompts([prompt_dir], options)
    answers = tuned.generate(requests, **given(options))
    if tuned.of_task(options["task_name"]).labels is not None and not quiet:
        note = f"{prompt_dir} is a classifier, and what it generates need not be one of its labels"
        click.echo(f"note: {note}; softprompt classify {prompt_dir} gives labels with probabilities", err=True)
    found = [answer.to_dict() for answer in answers]
    result = (
        found[0]
        if lines is None
        else {"results": [{"line": n} | each for n, each in zip(lines, found, strict=True)]}
    )
    show(result, "\n".join(answer.text for answer in answers), as_json=as_json)
