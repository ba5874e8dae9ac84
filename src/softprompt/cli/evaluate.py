"""``softprompt evaluate``."""

from __future__ import annotations

from typing import Any

import click

from softprompt.cli.options import base_options, given, output_options
from softprompt.cli.streams import show, start_logging


@click.command("evaluate")
@click.argument("prompt_dir")
@click.option("--data", required=True, type=click.Path(), help="Rows that were not trained on.")
@click.option("--without-prompt", is_flag=True, help="Evaluate the base with the template alone.")
@click.option(
    "--task",
    type=click.Choice(["classification", "generation"]),
    help="What the targets are; by default as in training.",
)
@click.option("--task-name", help="Task of a multitask prompt, by name or number.")
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
    prompt_dir: str,
    data: str,
    base_model: str | None,
    torch_dtype: str | None,
    device: str | None,
    ignore_fingerprint: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Evaluate a prompt, or its base alone, on a data file."""
    start_logging(quiet=quiet)
    from softprompt.evaluation.evaluate import evaluate
    from softprompt.inference.loading import load

    tuned = load(
        prompt_dir,
        base_model,
        torch_dtype=torch_dtype,
        device=device,
        ignore_fingerprint=ignore_fingerprint,
    )
    report = evaluate(tuned, data, **given(options))
    show(report.to_dict(), str(report), as_json=as_json)
