"""``softprompt tune``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.options import (
    Command,
    Decorated,
    given,
    label_names_option,
    named,
    option,
    options_of,
    output_options,
    overwrite_option,
    parts_of,
    show,
    start_logging,
    table,
    together,
    trust_option,
)
from softprompt.errors import UsageError
from softprompt.training import METHODS, TuneSettings, TuningConfig, full_names

if TYPE_CHECKING:
    from softprompt.inference import TunedPrompt


def run_options(*leave_out: str) -> Callable[[Decorated], Decorated]:
    """Return a decorator that adds the options of a run: data, base, settings and output; see ``run_values``."""
    return together(
        option(
            "--train-data",
            multiple=True,
            metavar="[TASK=]FILE",
            group="Data",
            help="Training data: JSONL, CSV, Parquet ..., - for stdin, or org/name:split of the Hub.  "
            "Several as TASK=FILE.  [repeatable]",
        ),
        option(
            "--validation-data",
            multiple=True,
            metavar="[TASK=]FILE",
            group="Data",
            help="Validation data, to keep the best epoch; several with the same tasks.  [repeatable]",
        ),
        option("--base-model", group="Model and engine", help="Base model: folder or name.  [default: demo]"),
        trust_option,
        option(
            "--method",
            type=click.Choice(list(METHODS)),
            group="Prompt",
            help="Method; --tuning-type under a shorter name.  [default: prompt_tuning]",
        ),
        options_of(
            TuneSettings, leave_out=("tuning_config", "task_verbalizers", "label_names", "config", *leave_out)
        ),
        label_names_option("Data"),
        options_of(TuningConfig),
        option(
            "--task-verbalizers",
            multiple=True,
            metavar="TASK=TEMPLATE",
            group="Several tasks",
            help="Template of one task; the others use --verbalizer.  [repeatable]",
        ),
        option("--output", type=click.Path(), group="Output", help="Directory to write the prompt to."),
        overwrite_option,
        option(
            "--resume", is_flag=True, group="Output", help="Resume the interrupted run in the output directory."
        ),
        option("--config", type=click.Path(), help="Run file (TOML); options override it."),
        output_options,
    )


def run_values(config: str | None, options: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """Return the keyword arguments of a run: the run file's, overridden by options; logging is started."""
    options = given(options)
    for name in ("train_data", "validation_data"):
        if name in options:
            options[name] = data_sets(options[name], "--" + name.replace("_", "-"))
    if "task_verbalizers" in options:
        options["task_verbalizers"] = named(options["task_verbalizers"], "--task-verbalizers", "TASK=TEMPLATE")
    values = _merged(config, options)
    if quiet:
        values["silence_progress_bars"] = True
    start_logging(quiet=quiet)
    return values


@click.command("tune", cls=Command)
@option(
    "--dry-run",
    is_flag=True,
    group="Output",
    help="Train nothing and write nothing: show the first records, their tokens, labels, steps, memory and time.",
)
@run_options()
def command(
    *, config: str | None, overwrite: bool, resume: bool, dry_run: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Tune a soft prompt for a frozen model."""
    values = run_values(config, options, quiet=quiet)
    values.pop("sweep", None)  # a run file may serve both commands
    output = values.pop("output", None)
    if output is None and not dry_run:
        raise UsageError("tune needs --output DIR: without it the prompt would be lost")
    from softprompt.training import tune

    if dry_run:
        found = tune(output=output, overwrite=overwrite, resume=resume, dry_run=True, **values)
        show(found.to_dict(), str(found), as_json=as_json)
        return
    tuned = tune(output=output, overwrite=overwrite, resume=resume, **values)
    result = summary(tuned, output)
    shown = {name: value for name, value in result.items() if not isinstance(value, dict | list)}
    parts = ", ".join(f"{name} {value:g}" for name, value in result["seconds_by_part"].items())
    shown |= {"seconds": f"{result['seconds']:g} ({parts})"}
    shown |= {"truncated": _truncated(result["cut"])}
    shown |= {f"validation {name}": value for name, value in result["metrics"].items()}
    shown["note"] = shown.pop("nothing_learnt")
    if result["seeds"]:
        from softprompt.training import ensemble_command, in_words

        shown["seeds"] = in_words(result["seeds"])
        if result["labels"] and (Path(output) / "seeds").is_dir():
            shown["ensemble"] = ensemble_command(Path(output), result["seeds"])
    show(result, table(shown), as_json=as_json)


def data_sets(words: Sequence[str], flag: str) -> str | dict[str, str]:
    """Return one data set, or several by their tasks.

    An existing path is a file even if it contains ``=``; any other word with ``=`` is TASK=FILE.

    Raises:
        UsageError: There are several, and one has no task or the task of another.
    """
    if len(words) == 1 and ("=" not in words[0] or os.path.exists(words[0])):
        return words[0]
    return named(words, flag, "TASK=FILE where there are several tasks")


def summary(tuned: TunedPrompt, output: str | Path) -> dict[str, Any]:
    """Return what ``tune --json`` prints."""
    manifest, metrics = tuned.whole, dict(tuned.metrics)
    by_task = manifest.data.get("tasks")
    cut = manifest.data["cut"] if by_task is None else {task: record["cut"] for task, record in by_task.items()}
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
        "nothing_learnt": metrics.get("nothing_learnt"),
        "seeds": metrics.get("seeds"),
        "seconds_by_part": metrics["seconds_by_part"],
    }


def _truncated(cut: dict[str, Any]) -> str | None:
    """Return how many texts were truncated to the maximum lengths, as a line of the table."""
    each = {"": cut} if "sources" in cut else cut
    parts = [
        f"{task} {found['sources']} sources, {found['targets']} targets".strip()
        for task, found in each.items()
        if found["sources"] or found["targets"]
    ]
    return "; ".join(parts) or None


def _merged(config: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of `tune`: the run file's, overridden by options."""
    tuning = parts_of(options, TuningConfig)
    values: dict[str, Any] = {}
    if config is not None:
        from softprompt.training import read_run

        values = full_names(read_run(config))
    tuning = {**values.get("tuning_config", {}), **tuning}
    options = full_names(options)
    return {**values, **options, **({"tuning_config": tuning} if tuning else {})}
