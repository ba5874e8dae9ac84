"""``--ray`` of generate, classify and evaluate: large batches on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from softprompt.batches import BatchSettings
from softprompt.cli.options import BASE, given, option, options_of, parts_of, show, start_logging, table, together
from softprompt.errors import UsageError

if TYPE_CHECKING:
    from softprompt.batches import BatchTask
    from softprompt.cli.options import Decorated

_GROUP = "Batches on Ray"


def address_option(group: str, text: str) -> Callable[[Decorated], Decorated]:
    """Return a decorator that adds ``--ray [ADDRESS]``."""
    flag: dict[str, Any] = {"is_flag": False, "flag_value": "local", "metavar": "[ADDRESS]"}
    return option("--ray", "address", **flag, group=group, help=text)


ray_options = together(
    address_option(_GROUP, "Compute on Ray, started here, or the cluster at an address; --data may be a folder."),
    option("--output", type=click.Path(), group=_GROUP, help="Folder of the answers, one file a part."),
    option("--resume", is_flag=True, group=_GROUP, help="Go on with the batch in the output folder."),
    options_of(BatchSettings),
)


def refused_without_ray(options: dict[str, Any]) -> None:
    """Pop the options of ``ray_options`` of a command that does not run on Ray, and refuse those that were given.

    Raises:
        UsageError: One was.
    """
    address = options.pop("address")
    values = {**parts_of(options, BatchSettings), "output": options.pop("output"), "resume": options.pop("resume")}
    if address is None and (odd := [name for name, value in values.items() if value]):
        raise UsageError(f"--{odd[0].replace('_', '-')} would be ignored without --ray; leave it out")


def on_ray(
    command: Literal["generate", "classify", "evaluate"],
    folders: Sequence[str],
    data: str | None,
    options: dict[str, Any],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run a command on Ray with its options, and show what came of it.

    Raises:
        UsageError: There is no data or output, several prompts, or an option that a batch would ignore.
    """
    start_logging(quiet=quiet)
    from softprompt.batches import BatchTask, Parts, prompts_in, run_batch

    settings = BatchSettings(**given(parts_of(options, BatchSettings)))
    address, output, resume = options.pop("address"), options.pop("output"), options.pop("resume")
    if data is None or output is None:
        raise UsageError("--ray needs --data, a file or a folder, and --output DIR")
    if len(folders) != 1:
        raise UsageError("--ray takes one prompt, or with --prompt-column the folder of several")
    reading = {name: options.pop(name) for name in BASE}
    columns = {name: options.pop(name, None) for name in ("input_field", "output_field")}
    known = {"classify": ("labels", "normalize"), "evaluate": ()}.get(command)
    asked = {name: value for name, value in given(options).items() if value is not False}
    if odd := [name for name in asked if known is not None and name not in (*known, "task_name")]:
        raise UsageError(f"--{odd[0].replace('_', '-')} would be ignored with --ray; leave it out")
    if "batch_size" in asked:
        raise UsageError("--batch-size would be ignored with --ray; --part-size says what a worker gets at a time")
    prompts = prompts_in(folders[0], settings.prompt_column)
    answering = BatchTask(command, prompts, settings.prompt_column, asked, given(reading), columns)
    found: dict[str, Any] = dict(run_batch(answering, [data], output, settings, address=address, resume=resume))
    if command == "evaluate":
        found |= _measured(list(Parts(Path(output), settings.output_format).rows()), answering)
    show({"output": output} | found, table({"output": output} | found), as_json=as_json)


def _measured(rows: Sequence[Mapping[str, Any]], asked: BatchTask) -> dict[str, Any]:
    """Return the metrics of answers with targets; records with an error count in no metric."""
    from softprompt.evaluation import label_metrics, text_metrics

    found: dict[str, Any] = {}
    for name in asked.prompts:
        own = [row for row in rows if row.get("error") is None and row.get("prompt", name) == name]
        if not own:
            continue
        gold = [row["target"] for row in own]
        if own[0].get("label") is not None:
            labels = list(dict.fromkeys([*own[0]["probabilities"], *gold]))
            scores = label_metrics(gold, [row["label"] for row in own], labels)
            metrics = {"accuracy": scores.accuracy, "macro_f1": scores.macro_f1}
        else:
            texts = text_metrics(gold, [row["text"] for row in own])
            metrics = {"exact_match": texts.exact_match, "rouge_l": texts.rouge_l}
        before = f"{name} " if asked.column else ""
        found |= {before + metric: value for metric, value in metrics.items()}
    return found
