"""``softprompt demo``: the whole job on what the package ships."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.options import Command, option, output_options, overwrite_option, say, show, start_logging

if TYPE_CHECKING:
    from softprompt.evaluation import Report

SETTINGS: dict[str, Any] = {
    "verbalizer": "Message: {{input}}\nLabel:",
    "num_epochs": 5,
    "batch_size": 16,
    "tuning_config": {
        "num_virtual_tokens": 20,
        "prompt_tuning_init_method": "TEXT",
        "prompt_tuning_init_text": "Is this message a complaint? Answer complaint or no complaint.",
    },
}
"""Chosen on the validation split; the test split is used for the table alone."""


@click.command("demo", cls=Command)
@option(
    "--output",
    type=click.Path(),
    default="runs/demo",
    show_default=True,
    group="Output",
    help="Directory to write the prompt to.",
)
@overwrite_option
@option("--seed", type=int, default=73, show_default=True, group="Optimisation", help="Random seed.")
@output_options
def command(output: str, overwrite: bool, seed: int, as_json: bool, quiet: bool) -> None:
    """Tune a complaint detector on the bundled model and data, and compare it with the base."""
    start_logging(quiet=quiet)
    from softprompt.bundled import complaints
    from softprompt.cli.tune import summary
    from softprompt.evaluation import evaluate
    from softprompt.training import tune

    tuned = tune(
        "demo",
        complaints("train"),
        complaints("validation"),
        output=output,
        overwrite=overwrite,
        seed=seed,
        silence_progress_bars=quiet,
        **SETTINGS,
    )
    base = evaluate(tuned, complaints("test"), without_prompt=True)
    after = evaluate(tuned, complaints("test"))
    # The curve shows the validation split, so the base is drawn as it does there.
    untuned = evaluate(tuned, complaints("validation"), without_prompt=True)
    curve = _draw_curve(tuned.history, Path(output), untuned.accuracy)
    result = summary(tuned, output) | {"curve": curve, "test": {"base": base.to_dict(), "tuned": after.to_dict()}}
    show(result, _text(base, after, output, curve), as_json=as_json)


def _draw_curve(history: Any, output: Path, base_accuracy: float | None) -> str | None:
    from softprompt.artifacts import CURVE_NAME
    from softprompt.display import training_curve
    from softprompt.errors import ConfigError

    path = output / CURVE_NAME
    try:
        training_curve(history, path, base_accuracy=base_accuracy)
    except ConfigError as error:
        say(f"warning: no training curve: {error}")
        return None
    return str(path)


def _text(base: Report, tuned: Report, output: str, curve: str | None) -> str:
    lines = [f"{'test split, ' + str(tuned.rows) + ' records':<24}{'base':>10}{'tuned':>10}"]
    for name, before, after in (
        ("accuracy", base.accuracy, tuned.accuracy),
        ("macro F1", base.macro_f1, tuned.macro_f1),
        ("perplexity of labels", base.perplexity, tuned.perplexity),
    ):
        lines.append(f"{name:<24}{before or 0.0:>10.3f}{after or 0.0:>10.3f}")
    lines += ["", f"prompt  {output}"]
    if curve is not None:
        lines.append(f"curve   {curve}")
    lines.append(f'try     softprompt classify {output} --text "The kettle broke after one day."')
    return "\n".join(lines)
