"""``softprompt generate``."""

from __future__ import annotations

import sys
from typing import Any

import click

from softprompt.cli.options import base_options, given, options_of, output_options
from softprompt.cli.prompts import base_options_of, load_prompts
from softprompt.cli.streams import show, start_logging
from softprompt.errors import UsageError
from softprompt.inference import GenerationOptions


@click.command("generate")
@click.argument("prompt_dir")
@click.option("--text", help="Input text; without it every line of stdin is one input.")
@click.option(
    "--field", "pairs", multiple=True, metavar="NAME=TEXT", help="Field of a template with several."
)
@click.option("--task-name", help="Task of a multitask prompt, by name or number.")
@click.option("--batch-size", type=int, help="Inputs in one pass.")
@options_of(GenerationOptions)
@base_options
@output_options
def command(
    *,
    prompt_dir: str,
    text: str | None,
    pairs: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Generate answers to a text, or to each line of stdin.

    With --json the answer to --text is one object; answers to lines are in "results", each with
    the number of its "line". Blank lines have no answer, and a warning says which they are.
    """
    lines = _lines() if text is None and not pairs else None
    requests = [request_of(text, pairs)] if lines is None else list(lines.values())
    base = base_options_of(options)
    settings = given(options)
    GenerationOptions.from_settings(
        {k: v for k, v in settings.items() if k not in ("batch_size", "task_name")}
    )
    start_logging(quiet=quiet)
    (tuned,) = load_prompts([prompt_dir], base)
    answers = tuned.generate(requests, **settings)
    found = [answer.to_dict() for answer in answers]
    result = (
        found[0]
        if lines is None
        else {"results": [{"line": n} | each for n, each in zip(lines, found, strict=True)]}
    )
    show(result, "\n".join(answer.text for answer in answers), as_json=as_json)


def request_of(text: str | None, pairs: tuple[str, ...]) -> str | dict[str, str]:
    """Return the one input that the options give: a text, or fields by name."""
    if not pairs:
        return text or ""
    fields = {} if text is None else {"input": text}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise UsageError(f"--field takes NAME=TEXT; got {pair!r}")
        if name in fields:
            raise UsageError(
                f"{name!r} is given twice by --field, or by --text and --field; leave one out"
            )
        fields[name] = value
    return fields


def _lines() -> dict[int, str]:
    """Return the lines of stdin that hold something, by their numbers."""
    if sys.stdin.isatty():
        raise UsageError("nothing to answer: give --text, or lines on stdin")
    try:
        lines = dict(enumerate((line.rstrip("\r\n") for line in sys.stdin), start=1))
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 ({error.reason}); convert the text first") from error
    kept = {number: line for number, line in lines.items() if line.strip()}
    if not kept:
        raise UsageError("nothing to answer: stdin is empty; give --text, or lines on stdin")
    blank = sorted(lines.keys() - kept.keys())
    if blank:
        shown = ", ".join(map(str, blank[:5])) + (", ..." if len(blank) > 5 else "")
        click.echo(f"warning: {len(blank)} blank lines of stdin have no answer: {shown}", err=True)
    return kept
