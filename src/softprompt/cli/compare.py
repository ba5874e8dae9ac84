"""``softprompt compare``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.evaluate import (
    BASELINES,
    baseline_options,
    baselines_of,
    prediction_options,
    record_options,
    scoring_options,
    task_option,
)
from softprompt.cli.options import (
    Command,
    base_options,
    given,
    load_prompts,
    option,
    output_options,
    show,
    start_logging,
)

if TYPE_CHECKING:
    from softprompt.inference import TunedPrompt

_data, _evaluation = partial(option, group="Data"), partial(option, group="Evaluation")


@click.command("compare", cls=Command)
@click.argument("subjects", nargs=-1, required=True, metavar="PROMPT|BASELINE...")
@record_options
@_data("--limit", type=int, help="Compare on the first records only.")
@task_option
@_evaluation("--task-name", help="Task of the multitask prompts, by name or number.")
@scoring_options
@baseline_options
@base_options
@prediction_options
@output_options
def command(*, subjects: tuple[str, ...], data: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Compare prompts and baselines on the same records, each with the first.

    A subject is the folder of a prompt, or a baseline: zero-shot, instruction, few-shot, instruction+few-shot.
    Shown are the metrics, the records won and lost against the first, an exact test and an interval of the
    difference, and what each costs in tokens and time.
    """
    start_logging(quiet=quiet)
    from softprompt.evaluation import compare

    folders = [name for name in subjects if name not in BASELINES]
    names = [name for name in subjects if name in BASELINES]
    found: dict[str, Any] = dict(zip(names, baselines_of(names, folders, options), strict=True))
    if folders:
        found |= _loaded(folders, options)
    comparison = compare(
        {name: found[name] for name in subjects}, data, silence_progress_bars=quiet, **given(options)
    )
    show(comparison.to_dict(), str(comparison), as_json=as_json)


def _loaded(folders: Sequence[str], options: dict[str, Any]) -> dict[str, TunedPrompt]:
    """Load prompts, which may be of several bases: each base once."""
    from softprompt.artifacts import load_adapter

    bases = {folder: options["base_model"] or load_adapter(folder).base_model for folder in folders}
    reading = {name: options.pop(name) for name in ("base_model", "torch_dtype", "device", "ignore_fingerprint")}
    found: dict[str, TunedPrompt] = {}
    for base in dict.fromkeys(bases.values()):
        own = [folder for folder in folders if bases[folder] == base]
        found |= zip(own, load_prompts(own, dict(reading)), strict=True)
    return found
