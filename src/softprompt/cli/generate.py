"""``softprompt generate``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import click

from softprompt.cli.options import base_options, given, options_of, output_options
from softprompt.cli.streams import show, start_logging
from softprompt.errors import UsageError
from softprompt.inference.options import GenerationOptions


@click.command("generate")
@click.argument("prompt_dir")
@click.option("--text", help="Input text; without it every line of stdin is one input.")
@click.option(
    "--field", "pairs", multiple=True, metavar="NAME=TEXT", help="Field of a template with several."
)
@click.option("--batch-size", type=int, help="Inputs in one pass.")
@options_of(GenerationOptions)
@base_options
@output_options
def command(
    *,
    prompt_dir: str,
    text: str | None,
    pairs: tuple[str, ...],
    base_model: str | None,
    torch_dtype: str | None,
    device: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Generate answers to a text, or to each line of stdin.

    With --json the answer to --text is one object; answers to lines are in "results".
    """
    requests = _requests(text, pairs)
    settings = given(options)
    GenerationOptions.from_settings({k: v for k, v in settings.items() if k != "batch_size"})
    start_logging(quiet=quiet)
    from softprompt.inference.loading import load

    tuned = load(prompt_dir, base_model, torch_dtype=torch_dtype, device=device)
    answers = tuned.generate(requests, **settings)
    results = [answer.to_dict() for answer in answers]
    single = text is not None or bool(pairs)
    result = results[0] if single else {"results": results}
    show(result, "\n".join(answer.text for answer in answers), as_json=as_json)


def _requests(text: str | None, pairs: tuple[str, ...]) -> list[str | Mapping[str, str]]:
    if pairs:
        fields = {} if text is None else {"input": text}
        for pair in pairs:
            name, separator, value = pair.partition("=")
            if not separator:
                raise UsageError(f"--field takes NAME=TEXT; got {pair!r}")
            fields[name] = value
        return [fields]
    if text is not None:
        return [text]
    if sys.stdin.isatty():
        raise UsageError("nothing to answer: give --text, or lines on stdin")
    lines = [line.rstrip("\r\n") for line in sys.stdin]
    requests: list[str | Mapping[str, str]] = [line for line in lines if line.strip()]
    if not requests:
        raise UsageError("nothing to answer: stdin is empty; give --text, or lines on stdin")
    return requests
