"""``softprompt distill``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.options import (
    Command,
    given,
    option,
    options_of,
    output_options,
    overwrite_option,
    show,
    start_logging,
    table,
    trust_option,
)
from softprompt.distillation import DistillSettings
from softprompt.errors import UsageError

if TYPE_CHECKING:
    from softprompt.inference import TunedPrompt

_FILE = click.Path(dir_okay=False)
_MEASURED = {
    "system_prompt",
    "documents",
    "examples",
    "questions",
    "input_field",
    "output_field",
    "unrelated",
    "base_model",
}
"""What can be given to measure a finished prompt with."""


@click.command("distill", cls=Command)
@option("--system-prompt", type=_FILE, metavar="FILE", group="Text", help="File with the text of a system prompt.")
@option(
    "--document",
    "documents",
    type=_FILE,
    multiple=True,
    metavar="FILE",
    group="Text",
    help="Text file; cut into chunks where it is too long.  [repeatable]",
)
@option("--examples", metavar="FILE", group="Text", help="Data file of examples, shown one behind the other.")
@option(
    "--questions",
    metavar="FILE",
    group="Questions",
    help="Data file of questions, with answers or without, or inputs of a task; instead of --self-study.",
)
@option("--base-model", group="Model and engine", help="Base model: folder or name.  [default: demo]")
@trust_option
@options_of(DistillSettings)
@option("--no-report", is_flag=True, group="Output", help="Do not measure the prompt on what was kept apart.")
@option(
    "--unrelated",
    metavar="FILE",
    group="Output",
    help="Data file of questions with answers that have nothing to do with the text, to measure damage on.",
)
@option(
    "--measure",
    type=click.Path(),
    metavar="PROMPT_DIR",
    group="Output",
    help="Train nothing: measure a finished prompt again, on --questions or on those that it kept apart.",
)
@option("--output", type=click.Path(), group="Output", help="Directory to write the prompt to.")
@overwrite_option
@option("--resume", is_flag=True, group="Output", help="Resume the interrupted run in the output directory.")
@option(
    "--dry-run",
    is_flag=True,
    group="Output",
    help="Train nothing and write nothing: show tokens, rows, memory and the time of each stage.",
)
@output_options
def command(
    *, dry_run: bool, no_report: bool, measure: str | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Distil a text into a prompt: a system prompt, documents, or examples."""
    values = given(options)
    if "output" not in values and not dry_run and measure is None:
        raise UsageError("distill needs --output DIR: without it the prompt would be lost")
    if "system_prompt" in values:
        values["system_prompt"] = Path(values["system_prompt"])
    if "documents" in values:
        values["documents"] = [Path(each) for each in values["documents"]]
    start_logging(quiet=quiet)
    from softprompt.distillation import REPORT_NAME, DistillationReport, Forecast, distill, measure_distilled

    if measure is not None:
        odd = sorted({name for name, each in values.items() if each} - _MEASURED - {"silence_progress_bars"})
        if odd or dry_run:
            raise UsageError(f"{odd[0] if odd else 'dry_run'} would be ignored with measure; leave it out")
        measured = measure_distilled(measure, **{name: values[name] for name in _MEASURED & values.keys()})
        show(measured.to_dict(), str(measured), as_json=as_json)
        return
    if quiet:
        values["silence_progress_bars"] = True
    found = distill(dry_run=dry_run, report=not no_report, **values)
    if isinstance(found, Forecast):
        show(found.to_dict(), str(found), as_json=as_json)
        return
    result = summary(found, values["output"])
    shown = {name: value for name, value in result.items() if not isinstance(value, dict)}
    parts = ", ".join(f"{name} {value:g}" for name, value in result["seconds_by_part"].items())
    shown |= {f"held-out {name}": value for name, value in result["held_out"].items()}
    text = table({**shown, "seconds": f"{result['seconds']:g} ({parts})"})
    written = Path(values["output"], REPORT_NAME)
    if written.exists():
        result["report"] = json.loads(written.read_text(encoding="utf-8"))
        text += f"\n\n{DistillationReport.from_dict(result['report'])}"
    show(result, text, as_json=as_json)


def summary(tuned: TunedPrompt, output: str) -> dict[str, Any]:
    """Return what ``distill --json`` prints."""
    manifest, metrics = tuned.whole, tuned.metrics
    return {
        "output": output,
        "base_model": manifest.base_model,
        "kind": manifest.settings["distillation"]["kind"],
        "virtual_tokens": tuned.config.num_virtual_tokens,
        "text_tokens": manifest.settings["text_tokens"],
        "questions": sum(manifest.data.get(use, {}).get("rows", 0) for use in ("train", "validation")),
        "steps": metrics["updates"],
        "kept_epoch": metrics["epoch"],
        "learning_rate": metrics["learning_rate"],
        "held_out": metrics.get("validation", {}),
        "nothing_learnt": metrics.get("nothing_learnt"),
        "seconds": metrics["seconds"],
        "seconds_by_part": metrics["seconds_by_part"],
    }
