"""``softprompt compare``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.evaluate import BASELINES, baseline_options, baselines_of, prediction_options
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

if TYPE_CHECKING:
    from softprompt.inference import TunedPrompt

_data, _evaluation = partial(option, group="Data"), partial(option, group="Evaluation")


@click.command("compare", cls=Command)
@click.argument("subjects", nargs=-1, required=True, metavar="PROMPT|BASELINE...")
@_data(
    "--data",
    required=True,
    type=click.Path(),
    help="Held-out records: a file, - for stdin, or org/name of the Hub.",
)
@_data("--input-field", help="Column of the input; by default as in training.")
@_data("--output-field", help="Column of the target; by default as in training.")
@label_names_option("Data")
@_data("--limit", type=int, help="Compare on the first records only.")
@_evaluation(
    "--task",
    type=click.Choice(["classification", "generation"]),
    help="Kind of targets; by default as in training.",
)
@_evaluation("--task-name", help="Task of the multitask prompts, by name or number.")
@_evaluation("--normalize", is_flag=True, help="Length-normalise label scores: divide by the label's token count.")
@_evaluation("--batch-size", type=int, help="Batch size.")
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
