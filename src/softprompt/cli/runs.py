"""``softprompt runs``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.options import Command, output_options, show, start_logging

if TYPE_CHECKING:
    from softprompt.training import RunSummary

_WIDEST = 32
_ON_THE_WAY = ("epoch", "epochs", "updates", "learning_rate", "tokens_per_second", "seconds_by_part", "start")


@click.command("runs", cls=Command)
@click.argument("folder", required=False)
@output_options
def command(folder: str | None, as_json: bool, quiet: bool) -> None:
    """Show the runs in FOLDER: the settings in which they differ, their metrics and sizes.

    FOLDER and the folders below it are searched; by default runs, or here. Interrupted runs come with the
    command that resumes them, broken ones with the reason.
    """
    start_logging(quiet=quiet)
    from softprompt.training import differing, list_runs

    chosen = folder or ("runs" if Path("runs").is_dir() else ".")
    runs = list_runs(chosen)
    names = differing(runs)
    result = {"folder": chosen, "differing": names, "runs": [run.to_dict() for run in runs]}
    show(result, _text(chosen, runs, names), as_json=as_json)


def _text(folder: str, runs: Sequence[RunSummary], names: Sequence[str]) -> str:
    if not runs:
        return f"no run in {folder}"
    from softprompt.evaluation import text_table

    metrics = list(dict.fromkeys(name for run in runs for name in _numbers(run)))
    head = ["run", "state", *(name.replace("_", " ") for name in (*names, *metrics)), "bytes", "created"]
    rows = [
        [
            run.folder,
            run.state,
            *(_shown(run.settings.get(name)) for name in names),
            *(_shown(_numbers(run).get(name)) for name in metrics),
            _shown(run.bytes),
            (run.created or "")[:16].replace("T", " "),
        ]
        for run in runs
    ]
    lines = text_table(head, rows)
    for run in runs:
        if run.state != "finished":
            lines.append(f"  {run.folder}: {run.reason}" + (f"; resume with: {run.resume}" if run.resume else ""))
    return "\n".join(lines)


def _numbers(run: RunSummary) -> dict[str, Any]:
    """Return the numbers among the metrics, those of the validation data too, not those of the way there."""
    inner = {
        f"{name} {key}": own
        for name, part in run.metrics.items()
        if isinstance(part, dict) and name not in _ON_THE_WAY
        for key, own in part.items()
    }
    found = {**inner, **run.metrics}
    return {name: found[name] for name in found if name not in _ON_THE_WAY and isinstance(found[name], int | float)}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = "" if value is None else str(value).replace("\n", "\\n")
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."
