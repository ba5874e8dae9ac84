"""``softprompt generate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.inputs import records_of, shared_out, stdin_lines
from softprompt.cli.options import (
    Command,
    base_options,
    data_option,
    generation_options,
    given,
    input_options,
    load_prompts,
    option,
    output_options,
    parts_of,
    request_of,
    say,
    show,
    start_logging,
)
from softprompt.cli.ray_options import on_ray, ray_options, refused_without_ray
from softprompt.errors import UsageError
from softprompt.generation import GenerationOptions

if TYPE_CHECKING:
    from softprompt.inference import Fields


@click.command("generate", cls=Command)
@click.argument("prompt_dir")
@option("--text", group="Input", help="Input text; without it each line of stdin is an input.")
@input_options
@data_option
@option("--batch-size", type=int, group="Input", help="Batch size: inputs in one forward pass.")
@generation_options()
@base_options
@ray_options
@output_options
def command(
    *,
    prompt_dir: str,
    text: str | None,
    pairs: tuple[str, ...],
    data: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Generate answers to a text, to each line of stdin, or to each record of a file.

    With --json the answer to --text is one object; answers to lines or records are in "results", each with
    its "line" or "record". Blank lines have no answer, and a warning says which they are.
    """
    single = text is not None or bool(pairs)
    if data is not None and single:
        raise UsageError("--data holds the inputs; leave --text and --field out")
    if options["address"] is not None:
        GenerationOptions(**given({name: options[name] for name in GenerationOptions.__dataclass_fields__}))
        on_ray("generate", [prompt_dir], data, options, as_json=as_json, quiet=quiet)
        return
    refused_without_ray(options)
    inputs: dict[int, Fields] = {1: request_of(text, pairs)} if single else {}
    if not single and data is None:
        inputs.update(stdin_lines())
    GenerationOptions(**parts_of(given(options), GenerationOptions))
    start_logging(quiet=quiet)
    (tuned,) = load_prompts([prompt_dir], options)
    inputs = inputs if data is None else records_of(data, tuned)
    own = tuned.of_task(options["task_name"])
    answers = shared_out(own, list(inputs.values()), lambda part: tuned.generate(part, **given(options)))
    if own.labels is not None and not quiet:
        note = f"{prompt_dir} is a classifier, and what it generates need not be one of its labels"
        say(f"note: {note}; softprompt classify {prompt_dir} gives labels with probabilities")
    key = "line" if data is None else "record"
    found = [{key: n} | answer.to_dict() for n, answer in zip(inputs, answers, strict=True)]
    show(
        answers[0].to_dict() if single else {"results": found},
        "\n".join(answer.text for answer in answers),
        as_json=as_json,
    )
