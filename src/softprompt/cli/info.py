"""``softprompt info``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.options import output_options
from softprompt.cli.streams import show, start_logging, table

if TYPE_CHECKING:
    from softprompt.artifacts.native import StoredAdapter
    from softprompt.inspection.describe import PromptSummary


@click.command("info")
@click.argument("prompt_dir")
@click.option("--base-model", help="Base model to compare with instead of the recorded one.")
@click.option("--without-base", is_flag=True, help="Do not load the base; no nearest tokens.")
@output_options
def command(
    prompt_dir: str, base_model: str | None, without_base: bool, as_json: bool, quiet: bool
) -> None:
    """Show what a prompt is, for which base, how it was made, and how good it is."""
    start_logging(quiet=quiet)
    from softprompt.artifacts.native import load_adapter

    stored = load_adapter(prompt_dir)
    summary = _summary(stored, base_model, without_base)
    made = (
        {"data": stored.manifest.data, "settings": stored.manifest.settings}
        if stored.manifest
        else {}
    )
    show(summary.to_dict() | made, _text(summary, made), as_json=as_json)


def _summary(stored: StoredAdapter, base_model: str | None, without_base: bool) -> PromptSummary:
    """Describe a prompt, with its base where that can be loaded."""
    from softprompt.backbone.facts import input_embedding
    from softprompt.backbone.load import load_base
    from softprompt.errors import BackboneError
    from softprompt.inspection.describe import describe

    recorded = stored.config.get("base_model_name_or_path")
    name = base_model or (stored.manifest.base_model if stored.manifest else recorded)
    if without_base or not name:
        return describe(stored)
    try:
        base = load_base(name)
    except BackboneError as error:
        if base_model is not None:
            raise
        click.echo(f"warning: shown without its base: {error}", err=True)
        return describe(stored)
    return describe(stored, input_embedding(base.model).weight, base.tokenizer)


def _text(summary: PromptSummary, made: dict[str, Any]) -> str:
    numbers = summary.geometry
    rows: dict[str, Any] = {
        "prompt": summary.location,
        "base model": summary.base_model,
        "fingerprint": summary.fingerprint,
        "task": summary.task or summary.task_type,
        "labels": None if summary.labels is None else ", ".join(summary.labels),
        "template": summary.template and summary.template.replace("\n", "\\n"),
        "virtual tokens": f"{summary.virtual_tokens} x {summary.width}",
        "size": f"{summary.parameters:,} values, {summary.bytes:,} bytes",
        "rms": numbers.rms,
        "rms / base rms": numbers.rms_ratio,
        "norms": f"{numbers.norm_min:.4f} to {numbers.norm_max:.4f}, mean {numbers.norm_mean:.4f}",
        "effective rank": numbers.effective_rank,
        "mean cosine": numbers.mean_pairwise_cosine,
        "created": summary.created,
    }
    lines = [table(rows)]
    for title, values in {"results": summary.metrics or {}, **made}.items():
        lines += ["", title, table(_flat(values, "  "))] if values else []
    if summary.nearest is not None:
        lines += ["", "nearest tokens (cosine)"]
        lines += [
            f"{number:>4}  " + "  ".join(f"{each.token!r} {each.cosine:.2f}" for each in row)
            for number, row in enumerate(summary.nearest, start=1)
        ]
    return "\n".join(lines)


def _flat(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name} ")
        else:
            flat[f"{prefix}{name}"] = repr(value) if isinstance(value, str) else value
    return flat
