"""``softprompt info``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.options import (
    Command,
    fingerprint_option,
    option,
    output_options,
    say,
    show,
    start_logging,
    table,
    trust_option,
)
from softprompt.errors import ArtifactError, BackboneError
from softprompt.fields import flat

if TYPE_CHECKING:
    from softprompt.artifacts import StoredPrompt
    from softprompt.backbone import Base
    from softprompt.engine import EngineChoice
    from softprompt.inspection import PromptSummary


@click.command("info", cls=Command)
@click.argument("prompt_dir")
@option("--base-model", group="Base model", help="Base model to compare with instead of the recorded one.")
@trust_option
@option(
    "--without-base",
    is_flag=True,
    group="Base model",
    help="Do not load the base model; no nearest tokens, no engine.",
)
@fingerprint_option
@output_options
def command(
    *,
    prompt_dir: str,
    base_model: str | None,
    without_base: bool,
    ignore_fingerprint: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show what a prompt is, for which base, how it was made, and how good it is.

    With its base it also says which engine runs it, and why no faster one does. `inspect` shows what it learned.
    """
    start_logging(quiet=quiet)
    from softprompt.artifacts import load_adapter
    from softprompt.backbone import input_embedding
    from softprompt.engine import choose_engine
    from softprompt.inspection import describe
    from softprompt.training import interruption

    where = interruption(Path(prompt_dir))
    try:
        stored = load_adapter(prompt_dir)
    except ArtifactError:
        if where is None:
            raise
        show({"location": prompt_dir, "interrupted": where}, f"{prompt_dir}: {where}", as_json=as_json)
        return
    if where is not None:
        say(f"warning: the prompt is of an earlier run; the one that was to replace it: {where}")
    base = None if without_base else _base(stored, base_model, ignore_fingerprint)
    if base is None:
        summary = describe(stored)
    else:
        summary = describe(stored, input_embedding(base.model).weight, base.tokenizer)
    engine = None
    if base is not None and _writes_text(stored):  # no engine runs classifiers
        engine = choose_engine(base, sees_input=bool(stored.config.get("prompt_sees_input", True)))
    made = {"data": stored.manifest.data, "settings": stored.manifest.settings} if stored.manifest else {}
    result = summary.to_dict() | {"engine": None if engine is None else asdict(engine)} | made
    show(result, _text(summary, engine, made), as_json=as_json)


def _base(stored: StoredPrompt, base_model: str | None, ignore_fingerprint: bool) -> Base | None:
    """Load the base and check that it is the prompt's; the recorded one may be absent."""
    from softprompt.artifacts import check_base, outside
    from softprompt.backbone import load_base

    recorded = stored.config.get("base_model_name_or_path")
    name = base_model or (stored.manifest.base_model if stored.manifest else recorded)
    if not name:
        return None
    try:
        base = load_base(base_model or outside(name, stored.location))
        if _writes_text(stored):  # under another head the sample of weights is another one
            check_base(stored, base.model, ignore=ignore_fingerprint)
    except (ArtifactError, BackboneError) as error:
        if base_model is not None:
            raise
        say(f"warning: shown without its base: {error}")
        return None
    return base


def _writes_text(stored: StoredPrompt) -> bool:
    return stored.config.get("task_type") in ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def _text(summary: PromptSummary, engine: EngineChoice | None, made: dict[str, Any]) -> str:
    numbers = summary.geometry
    rows: dict[str, Any] = {
        "prompt": summary.location,
        "base model": summary.base_model,
        "fingerprint": summary.fingerprint,
        "task": summary.task or summary.task_type,
        "labels": None if summary.labels is None else ", ".join(summary.labels),
        "template": summary.template and summary.template.replace("\n", "\\n"),
        "engine": engine and engine.name + (f" ({engine.reason})" if engine.reason else ""),
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
        shown = {n: repr(v) if isinstance(v, str) else v for n, v in flat(values, " ", before="  ").items()}
        lines += ["", title, table(shown)] if values else []
    if summary.nearest is not None:
        lines += ["", "nearest tokens (cosine)"]
        lines += [
            f"{number:>4}  " + "  ".join(f"{each.token!r} {each.cosine:.2f}" for each in row)
            for number, row in enumerate(summary.nearest, start=1)
        ]
    return "\n".join(lines)
