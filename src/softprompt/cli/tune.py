"""``softprompt tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.options import given, options_of, output_options, parts_of
from softprompt.cli.streams import show, start_logging, table
from softprompt.errors import UsageError
from softprompt.training.settings import TuneSettings
from softprompt.training.tuning_config import TuningConfig

if TYPE_CHECKING:
    from softprompt.inference.tuned import TunedPrompt


@click.command("tune")
@click.option("--config", type=click.Path(), help="Run file (TOML); options given here go first.")
@click.option("--base-model", help="Folder or name of the base model.  [default: demo]")
@click.option("--train-data", type=click.Path(), help="Training data: JSONL, CSV, Parquet ...")
@click.option("--validation-data", type=click.Path(), help="Data to choose the best epoch by.")
@click.option("--output", type=click.Path(), help="Directory to write the prompt to.")
@click.option("--overwrite", is_flag=True, help="Write into an output directory that is not empty.")
@click.option(
    "--resume", is_flag=True, help="Continue the interrupted run in the output directory."
)
@options_of(TuningConfig)
@options_of(TuneSettings, leave_out=("tuning_config",))
@output_options
def command(
    config: str | None, overwrite: bool, resume: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Tune a soft prompt for a frozen model."""
    values = _merged(config, given(options))
    output = values.pop("output", None)
    if output is None:
        raise UsageError("tune needs --output DIR: without it the prompt would be lost")
    if quiet:
        values["silence_progress_bars"] = True
    start_logging(quiet=quiet)
    from softprompt.training.tune import tune

    tuned = tune(output=output, overwrite=overwrite, resume=resume, **values)
    result = summary(tuned, output)
    shown = {name: value for name, value in result.items() if not isinstance(value, dict | list)}
    shown |= {f"validation {name}": value for name, value in result["metrics"].items()}
    show(result, table(shown), as_json=as_json)


def summary(tuned: TunedPrompt, output: str | Path) -> dict[str, Any]:
    """Return what ``tune --json`` prints."""
    manifest, metrics = tuned.manifest, dict(tuned.metrics)
    return {
        "output": str(output),
        "base_model": manifest.base_model,
        "task": manifest.task,
        "labels": None if manifest.labels is None else list(manifest.labels),
        "steps": metrics["updates"],
        "epochs": metrics["epochs"],
        "kept_epoch": metrics["epoch"],
        "final_loss": metrics["loss"],
        "metrics": metrics.get("validation", {}),
        "learning_rate": metrics["learning_rate"],
        "tokens_per_second": metrics["tokens_per_second"],
        "seconds": metrics["seconds"],
    }


def _merged(config: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of `tune`: the run file's, overridden by the options given."""
    tuning = parts_of(options, TuningConfig)
    values: dict[str, Any] = {}
    if config is not None:
        from softprompt.training.run_file import read_run

        values = read_run(config)
        if "learning_rate" in options:
            values.pop("lr", None)
    tuning = {**values.get("tuning_config", {}), **tuning}
    return {**values, **options, **({"tuning_config": tuning} if tuning else {})}
