"""``softprompt sources``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.options import Command, option, output_options, show, start_logging, trust_option
from softprompt.errors import UsageError

if TYPE_CHECKING:
    from softprompt.training import SourceInfo


@click.group("sources")
def command() -> None:
    """Source prompts: what a multitask prompt can start from."""


@command.command("list", cls=Command)
@option(
    "--source-prompt-base",
    group="Sources",
    help="Folder of source prompts; by default the environment's SOURCE_PROMPT_BASE.",
)
@option("--base-model", group="Sources", help="Base model; shows which sources fit it, and why others do not.")
@trust_option
@output_options
def list_command(source_prompt_base: str | None, base_model: str | None, as_json: bool, quiet: bool) -> None:
    """List the source prompts there are: tasks, sizes, base, metrics."""
    start_logging(quiet=quiet)
    from softprompt.training import VARIABLE, list_sources, source_folder

    folder = source_folder(source_prompt_base)
    if folder is None:
        raise UsageError(f"no folder to look in; give --source-prompt-base, or set {VARIABLE}")
    sources = list_sources(folder)
    misfits: list[str | None] = [None] * len(sources)
    if base_model is not None:
        from softprompt.backbone import load_base

        base = load_base(base_model)
        misfits = [source.misfit(base.facts.token_dim, base.fingerprint) for source in sources]
    found, lines = [], []
    for source, misfit in zip(sources, misfits, strict=True):
        fits = {} if misfit is None else {"fits": not misfit, "misfit": misfit or None}
        found.append(source.to_dict() | fits)
        lines.append(_line(source, misfit))
    text = "\n".join(lines) or f"no source prompts in {folder}"
    show({"folder": str(folder), "sources": found}, text, as_json=as_json)


def _line(source: SourceInfo, misfit: str | None) -> str:
    if source.problem:
        return f"{source.name}  cannot be used: {source.problem}"
    tasks = ", ".join(source.tasks) or "none (a plain prompt, for ONLY_SOURCE_SHARED)"
    parts = [
        source.name,
        f"tasks: {tasks}",
        f"{source.virtual_tokens} x {source.width}, num_ranks {source.ranks}",
        f"base: {source.base_model or 'not on record'}",
    ]
    parts += [f"{name} {value:.4g}" for name, value in _measured(source.metrics).items()]
    if misfit is not None:
        parts.append(f"does not fit: {misfit}" if misfit else "fits")
    return "  ".join(parts)


def _measured(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the validation metrics over all tasks, or the training loss where there are none."""
    measured = metrics.get("validation") or {"training loss": metrics.get("loss")}
    return {
        name: measured[name]
        for name in ("accuracy", "loss", "training loss")
        if isinstance(measured.get(name), float)
    }
