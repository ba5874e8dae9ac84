"""``softprompt classify``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.inputs import records_of, shared_out, stdin_lines
from softprompt.cli.options import (
    Command,
    base_options,
    data_option,
    given,
    input_options,
    load_prompts,
    option,
    output_options,
    request_of,
    show,
    start_logging,
)
from softprompt.cli.ray_options import on_ray, ray_options, refused_without_ray
from softprompt.errors import UsageError

if TYPE_CHECKING:
    from softprompt.generation import LabelScores
    from softprompt.inference import Ensemble, Fields, TunedPrompt

_SHOWN = 10
"""Labels of one text that are listed for people."""


@click.command("classify", cls=Command)
@click.argument("prompt_dirs", nargs=-1, required=True)
@option("--text", group="Input", help="Input text; without it each line of stdin is an input.")
@input_options
@data_option
@option("--batch-size", type=int, group="Input", help="Batch size: (input, label) pairs in one forward pass.")
@option(
    "--label", "labels", multiple=True, group="Labels", help="Label, instead of the prompt's own.  [repeatable]"
)
@option("--normalize", is_flag=True, group="Labels", help="Divide a label's score by its token count.")
@option(
    "--combine",
    type=click.Choice(["mean", "vote"]),
    group="Labels",
    help="Ensemble of several prompts: mean log-probability (default), or majority vote.",
)
@base_options
@ray_options
@output_options
def command(
    *,
    prompt_dirs: tuple[str, ...],
    text: str | None,
    pairs: tuple[str, ...],
    data: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Answer a text, each line of stdin, or each record of a file with the likeliest label.

    Several prompts of one base and one label set answer as an ensemble. With --json the answer to
    --text is one object; those to lines or records are in "results", each with its "line" or "record".
    """
    if data is not None and (text is not None or pairs):
        raise UsageError("--data holds the inputs; leave --text and --field out")
    if options["address"] is not None:
        on_ray("classify", prompt_dirs, data, options, as_json=as_json, quiet=quiet)
        return
    refused_without_ray(options)
    single = data is None and (text is not None or bool(pairs))
    inputs: dict[int, Fields] = {1: request_of(text, pairs)} if single else {}
    if not single and data is None:
        inputs.update(stdin_lines())
    start_logging(quiet=quiet)
    from softprompt.inference import TunedPrompt

    subject = _subject(prompt_dirs, options)
    if data is not None:
        inputs = records_of(data, subject if isinstance(subject, TunedPrompt) else subject.members[0])
    values = list(inputs.values())
    if isinstance(subject, TunedPrompt):
        found = shared_out(subject, values, lambda part: subject.classify(part, **given(options)))
    else:  # which shares its passes out by itself
        found = subject.classify(values, **given(options))
    if single:
        show(found[0].to_dict(), _ranked(found[0]), as_json=as_json)
        return
    key = "line" if data is None else "record"
    results = [{key: n} | each.to_dict() for n, each in zip(inputs, found, strict=True)]
    answers = "\n".join(f"{each.label}\t{each.probabilities[each.label]:.4f}" for each in found)
    show({"results": results}, answers, as_json=as_json)


def _subject(prompt_dirs: Sequence[str], options: dict[str, Any]) -> TunedPrompt | Ensemble:
    """Load the prompts, and check the options that only one or only several of them take."""
    from softprompt.inference import Ensemble

    combine, task = options.pop("combine"), options.pop("task_name")
    if len(prompt_dirs) == 1:
        if combine is not None:
            raise UsageError("--combine would be ignored with one prompt; name two or more, or leave it out")
        tuned = load_prompts(prompt_dirs, options)[0].of_task(task)
        if tuned.labels is None and not options["labels"]:
            raise UsageError(
                f"{prompt_dirs[0]} generates free text and has no label set; name labels with --label, or use "
                f"softprompt generate {prompt_dirs[0]}"
            )
        return tuned
    if options["labels"]:
        raise UsageError("--label is for one prompt; the prompts of an ensemble score the labels they share")
    return Ensemble(load_prompts(prompt_dirs, options), combine=combine or "mean", names=prompt_dirs, task=task)


def _ranked(scores: LabelScores) -> str:
    """Return the labels of one text with their probabilities, the answer first."""
    shares = sorted(scores.probabilities.items(), key=lambda each: (each[0] != scores.label, -each[1]))
    width = max(len(label) for label, _ in shares[:_SHOWN])
    lines = [f"{label:<{width}}  {share:.4f}" for label, share in shares[:_SHOWN]]
    left = len(shares) - _SHOWN
    return "\n".join([*lines, f"... and {left} more labels; --json shows all"] if left > 0 else lines)
