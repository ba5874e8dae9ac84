"""``softprompt evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.options import base_options, given, output_options
from softprompt.cli.prompts import base_options_of, load_prompts
from softprompt.cli.streams import show, start_logging
from softprompt.errors import UsageError

if TYPE_CHECKING:
    from softprompt.inference import Combine, Ensemble, TunedPrompt


@click.command("evaluate")
@click.argument("prompt_dirs", nargs=-1, required=True)
@click.option("--data", required=True, type=click.Path(), help="Rows that were not trained on.")
@click.option(
    "--combine",
    type=click.Choice(["mean", "vote"]),
    help="How several prompts answer together: mean log-probability (default), or majority vote.",
)
@click.option("--without-prompt", is_flag=True, help="Evaluate the base with the template alone.")
@click.option(
    "--task",
    type=click.Choice(["classification", "generation"]),
    help="What the targets are; by default as in training.",
)
@click.option("--task-name", help="Task of a multitask prompt, by name or number.")
@click.option("--task-field", help="Column that names the task of each row of a multitask prompt.")
@click.option("--normalize", is_flag=True, help="Divide label scores by the label's token count.")
@click.option("--limit", type=int, help="Evaluate the first rows only.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "forest", "expand", "plain"]),
    help="How targets are scored; by default the fastest exact way.",
)
@click.option("--batch-size", type=int, help="Rows in one pass.")
@click.option("--input-field", help="Column of the input; by default as in training.")
@click.option("--output-field", help="Column of the target; by default as in training.")
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
