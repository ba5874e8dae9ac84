"""``softprompt generate``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import count
from typing import Any

import click

from softprompt.cli.options import (
    Command,
    base_options,
    given,
    input_options,
    load_prompts,
    option,
    options_of,
    output_options,
    parts_of,
    request_of,
    show,
    start_logging,
)
from softprompt.errors import UsageError
from softprompt.generation import GenerationOptions


@click.command("generate", cls=Command)
@click.argument("prompt_dir")
@option("--text", group="Input", help="Input text; without it each line of stdin is an input.")
@input_options
@option("--batch-size", type=int, group="Input", help="Batch size: inputs in one forward pass.")
@options_of(GenerationOptions, leave_out=("json_schema",))
@option(
    "--json-schema",
    type=click.File(encoding="utf-8"),
    callback=lambda context, parameter, file: file and file.read(),
    group="Form of the answer",
    help="File with a JSON schema of the answer, which is JSON then.",
)
@base_options
@output_options
def command(
    *, prompt_dir: str, text: str | None, pairs: tuple[str, ...], as_json: bool, quiet: bool, **options: Any
) -> None:
    """Generate answers to a text, or to each line of stdin.

    With --json the answer to --text is one object; answers to lines are in "results", each with
    the number of its "line". Blank lines have no answer, and a warning says which they are.
    """
    lines = _lines() if text is None and not pairs else None
    requests = [request_of(text, pairs)] if lines is None else list(lines.values())
    GenerationOptions(**parts_of(given(options), GenerationOptions))
    start_logging(quiet=quiet)
    (tuned,) = load_prompts([prompt_dir], options)
    answers = tuned.generate(requests, **given(options))
    found = [answer.to_dict() for answer in answers]
    result = (
        found[0]
        if lines is None
        else {"results": [{"line": n} | each for n, each in zip(lines, found, strict=True)]}
    )
    show(result, "\n".join(answer.text for answer in answers), as_json=as_json)


def _lines() -> dict[int, str]:
    """Return the lines of stdin that are not blank, by their numbers."""
    if sys.stdin.isatty():
        raise UsageError("nothing to answer: give --text, or lines on stdin")
    lines = dict(enumerate(map(_line, _raw_lines(), count(1)), start=1))
    kept = {number: line for number, line in lines.items() if line.strip()}
    if not kept:
        raise UsageError("nothing to answer: stdin is empty; give --text, or lines on stdin")
    blank = sorted(lines.keys() - kept.keys())
    if blank:
        shown = ", ".join(map(str, blank[:5])) + (", ..." if len(blank) > 5 else "")
        click.echo(f"warning: {len(blank)} blank lines of stdin have no answer: {shown}", err=True)
    return kept


def _raw_lines() -> Iterable[bytes]:
    # In some locales Python would decode bytes that are not UTF-8 to halves of characters.
    buffer = getattr(sys.stdin, "buffer", None)
    return (line.encode(errors="surrogatepass") for line in sys.stdin) if buffer is None else buffer


def _line(raw: bytes, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"stdin is not UTF-8: byte 0x{raw[error.start]:02x} in line {number}; convert the text first"
        ) from error
