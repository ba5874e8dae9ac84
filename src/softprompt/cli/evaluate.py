"""``softprompt evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.options import (
    Command,
    base_options,
    base_options_of,
    given,
    load_prompts,
    option,
    output_options,
)
from softprompt.cli.streams import show, start_logging
from softprompt.errors import UsageError

if TYPE_CHECKING:
    from softprompt.inference import Combine, Ensemble, TunedPrompt


@click.command("evaluate", cls=Command)
@click.argument("prompt_dirs", nargs=-1, required=True)
@option(
    "--data",
    required=True,
    type=click.Path(),
    group="Data",
    help="Held-out records to evaluate on.",
)
@option("--input-field", group="Data", help="Column of the input; by default as in training.")
@option("--output-field", group="Data", help="Column of the target; by default as in training.")
@option("--task-field", group="Data", help="Column with each record's task, for multitask prompts.")
@option("--limit", type=int, group="Data", help="Evaluate the first records only.")
@option(
    "--task",
    type=click.Choice(["classification", "generation"]),
    group="Evaluation",
    help="Kind of targets; by default as in training.",
)
@option("--task-name", group="Evaluation", help="Task of a multitask prompt, by name or number.")
@option(
    "--combine",
    type=click.Choice(["mean", "vote"]),
    group="Evaluation",
    help="Ensemble of several prompts: mean log-probability (default), or majority vote.",
)
@option(
    "--without-prompt",
    is_flag=True,
    group="Evaluation",
    help="Evaluate the base model with the template alone.",
)
@option(
    "--normalize",
    is_flag=True,
    group="Evaluation",
    help="Length-normalise label scores: divide by the label's token count.",
)
@option("--batch-size", type=int, group="Evaluation", help="Batch size.")
@option(
    "--engine",
    type=click.Choice(["auto", "forest", "expand", "plain"]),
    group="Evaluation",
    help="Engine of the forward passes; by default the fastest exact one.",
)
@base_options
@output_options
def command(
    *,
    prompt_dirs: tuple[str, ...],
    data: str,
    combine: Combine | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Evaluate a prompt, or its base alone, on a data file.

    Several prompts of one base and one label set are evaluated as an ensemble, and each by itself.
    """
    if combine is not None and len(prompt_dirs) == 1:
        raise UsageError(
            "--combine would be ignored with one prompt; name two or more, or leave it out"
        )
    start_logging(quiet=quiet)
    from softprompt.evaluation import evaluate
    from softprompt.inference import Ensemble

    prompts = load_prompts(prompt_dirs, base_options_of(options))
    subject: TunedPrompt | Ensemble = prompts[0]
    if len(prompts) > 1:
        task = options.pop("task_name")
        subject = Ensemble(prompts, combine=combine or "mean", names=prompt_dirs, task=task)
    report = evaluate(subject, data, **given(options))
    show(report.to_dict(), str(report), as_json=as_json)
