"""``softprompt evaluate``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.options import (
    Command,
    base_options,
    given,
    label_names_option,
    load_prompts,
    option,
    output_options,
    show,
    start_logging,
)
from softprompt.errors import UsageError

if TYPE_CHECKING:
    from softprompt.inference import Combine, Ensemble, TunedPrompt


_data, _evaluation = partial(option, group="Data"), partial(option, group="Evaluation")


@click.command("evaluate", cls=Command)
@click.argument("prompt_dirs", nargs=-1, required=True)
@_data(
    "--data",
    required=True,
    type=click.Path(),
    help="Held-out records: a file, - for stdin, or org/name of the Hub.",
)
@_data("--input-field", help="Column of the input; by default as in training.")
@_data("--output-field", help="Column of the target; by default as in training.")
@label_names_option("Data")
@_data("--task-field", help="Column with each record's task, for multitask prompts.")
@_data("--limit", type=int, help="Evaluate the first records only.")
@_evaluation(
    "--task",
    type=click.Choice(["classification", "generation"]),
    help="Kind of targets; by default as in training.",
)
@_evaluation("--task-name", help="Task of a multitask prompt, by name or number.")
@_evaluation(
    "--combine",
    type=click.Choice(["mean", "vote"]),
    help="Ensemble of several prompts: mean log-probability (default), or majority vote.",
)
@_evaluation("--without-prompt", is_flag=True, help="Evaluate the base model with the template alone.")
@_evaluation("--normalize", is_flag=True, help="Length-normalise label scores: divide by the label's token count.")
@_evaluation("--batch-size", type=int, help="Batch size.")
@_evaluation(
    "--engine",
    type=click.Choice(["auto", "forest", "expand", "plain"]),
    help="Engine of the forward passes; by default the fastest exact one.",
)
@base_options
@output_options
def command(
    *, prompt_dirs: tuple[str, ...], data: str, combine: Combine | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Evaluate a prompt, or its base alone, on a data file.

    Several prompts of one base and one label set are evaluated as an ensemble, and each by itself.
    """
    if combine is not None and len(prompt_dirs) == 1:
        raise UsageError("--combine would be ignored with one prompt; name two or more, or leave it out")
    start_logging(quiet=quiet)
    from softprompt.evaluation import evaluate
    from softprompt.inference import Ensemble

    prompts = load_prompts(prompt_dirs, options)
    subject: TunedPrompt | Ensemble = prompts[0]
    if len(prompts) > 1:
        task = options.pop("task_name")
        subject = Ensemble(prompts, combine=combine or "mean", names=prompt_dirs, task=task)
    report = evaluate(subject, data, **given(options))
    show(report.to_dict(), str(report), as_json=as_json)
