"""``softprompt tune``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.options import given, options_of, output_options, parts_of
from softprompt.cli.streams import show, start_logging, table
from softprompt.errors import UsageError
from softprompt.training import TuneSettings, TuningConfig

if TYPE_CHECKING:
    from softprompt.inference import TunedPrompt


@click.command("tune")
@click.option("--config", type=click.Path(), help="Run file (TOML); options given here go first.")
@click.option("--base-model", help="Folder or name of the base model.  [default: demo]")
@click.option(
    "--train-data",
    multiple=True,
    metavar="[TASK=]FILE",
    help="Training data: JSONL, CSV, Parquet ...  Give several as TASK=FILE.  [repeatable]",
)
@click.option(
    "--validation-data",
    multiple=True,
    metavar="[TASK=]FILE",
    help="Data to choose the best epoch by; for several, the same tasks.  [repeatable]",
)
@click.option(
    "--task-verbalizers",
    multiple=True,
    metavar="TASK=TEMPLATE",
    help="Template of one task among several; --verbalizer is for the others.  [repeatable]",
)
@click.option("--output", type=click.Path(), help="Directory to write the prompt to.")
@click.option("--overwrite", is_flag=True, help="Write into an output directory that is not empty.")
@click.option(
    "--resume", is_flag=True, help="Continue the interrupted run in the output directory."
)
@options_of(TuningConfig)
@options_of(TuneSettings, leave_out=("tuning_config", "task_verbalizers"))
@output_options
def command(
    config: str | None, overwrite: bool, resume: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Tune a soft prompt for a frozen model."""
    options = given(options)
    for name in ("train_data", "validation_data"):
        if name in options:
            options[name] = data_sets(options[name], "--" + name.replace("_", "-"))
    if "task_verbalizers" in options:
        options["task_verbalizers"] = pairs(options["task_verbalizers"], "--task-verbalizers")
    values = _merged(config, options)
    output = values.pop("output", None)
    if output is None:
        raise UsageError("tune needs --output DIR: without it the prompt would be lost")
    if quiet:
        values["silence_progress_bars"] = True
    start_logging(quiet=quiet)
    from softprompt.training import tune

    tuned = tune(output=output, overwrite=overwrite, resume=resume, **values)
    result = summary(tuned, output)
    shown = {name: value for name, value in result.items() if not isinstance(value, dict | list)}
    shown |= {"cut rows": _cut_rows(result["cut"])}
    shown |= {f"validation {name}": value for name, value in result["metrics"].items()}
    show(result, table(shown), as_json=as_json)


def data_sets(words: Sequence[str], option: str) -> str | dict[str, str]:
    """Return one data set, or several by their tasks.

    A path that exists is that file, also with a ``=`` in it; anything else with a ``=`` is TASK=FILE.

    Raises:
        UsageError: there are several, and one has no task.
    """
    if len(words) == 1 and ("=" not in words[0] or os.path.exists(words[0])):
        return words[0]
    return pairs(words, option)


def pairs(words: Sequence[str], option: str) -> dict[str, str]:
    """Return what ``TASK=VALUE`` words say.

    Raises:
        UsageError: one has no task, or a task comes twice.
    """
    found: dict[str, str] = {}
    for word in words:
        task, separator, value = word.partition("=")
        if not (separator and task and value):
            raise UsageError(f"{option} takes TASK=... where there are several tasks; got {word!r}")
        if task in found:
            raise UsageError(f"{option} names the task {task!r} twice; give each task once")
        found[task] = value
    return found


def summary(tuned: TunedPrompt, output: str | Path) -> dict[str, Any]:
    """Return what ``tune --json`` prints."""
    manifest, metrics = tuned.whole, dict(tuned.metrics)
    by_task = manifest.data.get("tasks")
    cut = (
        manifest.data["cut"]
        if by_task is None
        else {task: record["cut"] for task, record in by_task.items()}
    )
    return {
        "output": str(output),
        "base_model": manifest.base_model,
        "task": manifest.task,
        "tasks": None if manifest.tasks is None else list(manifest.tasks),
        "labels": None if manifest.labels is None else list(manifest.labels),
        "steps": metrics["updates"],
        "epochs": metrics["epochs"],
        "kept_epoch": metrics["epoch"],
        "final_loss": metrics["loss"],
        "metrics": metrics.get("validation", {}),
        "cut": cut,
        "learning_rate": metrics["learning_rate"],
        "tokens_per_second": metrics["tokens_per_second"],
        "seconds": metrics["seconds"],
    }


def _cut_rows(cut: dict[str, Any]) -> str | None:
    """Return how many texts were cut to the length limits, as a line of the table."""
    each = {"": cut} if "sources" in cut else cut
    parts = [
        f"{task} {found['sources']} sources, {found['targets']} targets".strip()
        for task, found in each.items()
        if found["sources"] or found["targets"]
    ]
    return "; ".join(parts) or None


def _merged(config: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of `tune`: the run file's, overridden by the options given."""
    tuning = parts_of(options, TuningConfig)
    values: dict[str, Any] = {}
    if config is not None:
        from softprompt.training import read_run

        values = read_run(config)
        if "learning_rate" in options:
            values.pop("lr", None)
    tuning = {**values.get("tuning_config", {}), **tuning}
    return {**values, **options, **({"tuning_config": tuning} if tuning else {})}
