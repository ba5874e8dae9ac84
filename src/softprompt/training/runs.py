"""The runs in a folder: what each prompt was made with, how good it is, and what was not finished."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from softprompt.artifacts import MANIFEST_NAME, STATE_DIRECTORY, load_adapter
from softprompt.errors import ArtifactError, SoftPromptError
from softprompt.training.output import (
    PLAN_FILE,
    begun_by,
    how_to_go_on,
    resume_command,
    state_path,
)
from softprompt.training.run_file import RUN_FILE, read_run
from softprompt.untrusted import MOST_TEXT_BYTES, check_plain, parse_object, read_bytes

_CONFIG = "adapter_config.json"
_DEPTH = 4
"""Levels of folders that are looked through."""

_APART = ("silence_progress_bars", "output", "config", "distillation", "text_sha256")
"""Keys of settings that say nothing of a prompt, or are tables of their own."""

_CHOSEN = "prompt_tuning_init_method"  # by the data where it is not given: an interrupted run does not say it


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A folder that ``tune`` wrote, or began to, or another prompt.

    Attributes:
        folder: Its path below the folder that was searched.
        state: Whether the prompt is there; an interrupted run may also be one that still runs.
        reason: Why it is broken, or where it was interrupted.
        resume: Command that continues an interrupted run.
        settings: Settings by name, those of the prompt and the names of base and data among them.
        metrics: Metrics recorded when it was made.
        bytes: Size of its tensors.
        created: When it was made, as ISO 8601.
    """

    folder: str
    state: Literal["finished", "interrupted", "broken"]
    reason: str | None = None
    resume: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    bytes: int | None = None
    created: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def list_runs(folder: str | Path) -> list[RunSummary]:
    """Return the runs at and below a folder, by their paths; a broken one is listed with its reason.

    Raises:
        ArtifactError: There is no such folder.
    """
    top = Path(folder)
    if not top.is_dir():
        raise ArtifactError(f"expected a folder of runs, {top} is not a folder; name the one that your runs are in")
    return [run for path in _folders(top) for run in _runs_of(path, os.path.relpath(path, top))]


def differing(runs: Sequence[RunSummary]) -> list[str]:
    """Return the names of the settings in which runs that are not broken differ."""
    whole = [run for run in runs if run.state != "broken" and run.settings]
    names = dict.fromkeys(name for run in whole for name in run.settings)
    return [name for name in names if len(set(_values(whole, name))) > 1]


def _values(runs: Sequence[RunSummary], name: str) -> Iterator[str]:
    for run in runs:
        if run.state == "finished" or name in run.settings or name != _CHOSEN:
            yield json.dumps(run.settings.get(name), default=str)


def interruption(folder: Path) -> str | None:
    """Return where a run in a folder was interrupted, and how it goes on; None where it was not."""
    if begun_by(folder) is None:
        return None
    if not state_path(folder).exists():
        return how_to_go_on("before its training", folder)
    try:
        where = _stopped_at(state_path(folder))
    except (SoftPromptError, KeyError, ValueError, TypeError, AttributeError, StopIteration, RecursionError):
        return f"its state is damaged; start again with softprompt {begun_by(folder)} --overwrite --output {folder}"
    return how_to_go_on(where, folder)


def _stopped_at(path: Path) -> str:
    """Return where a run stopped, by the header of its state; what else it has is read by who resumes it."""
    head = read_bytes(path, 8 + MOST_TEXT_BYTES, head=True)
    size = int.from_bytes(head[:8], "little")
    if MOST_TEXT_BYTES < size < path.stat().st_size:
        return "in its training"
    state = json.loads(json.loads(head[8 : 8 + size])["__metadata__"]["state"])
    run = next(iter(state["runs"].values()))["run"]
    update, epoch = run["update"], run["epoch"] + 1
    check_plain([update, epoch], path.name)
    return f"after update {update:d} (epoch {epoch:d})"


def _folders(top: Path) -> Iterator[Path]:
    for path, below, files in os.walk(top):
        level = len(Path(path).relative_to(top).parts)
        if {_CONFIG, MANIFEST_NAME} & set(files) or STATE_DIRECTORY in below:
            yield Path(path)
        below[:] = sorted(name for name in below if level < _DEPTH and not name.startswith("."))


def _runs_of(path: Path, name: str) -> Iterator[RunSummary]:
    """Yield the finished run of a folder, and the one that was to replace it."""
    if (path / STATE_DIRECTORY).is_dir():
        try:
            yield _unfinished(path, name)
        except (SoftPromptError, OSError) as error:
            yield RunSummary(name, "broken", str(error))
    if (path / _CONFIG).exists() or (path / MANIFEST_NAME).exists():
        yield _finished(path, name)


def _unfinished(path: Path, name: str) -> RunSummary:
    where = interruption(path)
    if where is None:
        return RunSummary(name, "broken", "it ended before its first state was saved; start it again")
    saved = _planned(path) if begun_by(path) != "tune" else read_run(state_path(path).with_name(RUN_FILE))
    damaged = "damaged" in where
    return RunSummary(
        name,
        "broken" if damaged else "interrupted",
        where.partition(";")[0],
        None if damaged else resume_command(path),
        _flat(saved),
    )


def _planned(path: Path) -> dict[str, Any]:
    """Return the settings of an interrupted run of another command than ``tune``."""
    file, plan = state_path(path).with_name(PLAN_FILE), dict[str, Any]()
    if file.stat().st_size <= MOST_TEXT_BYTES:  # with a long text it is more than a list has to read
        plan = parse_object(read_bytes(file, MOST_TEXT_BYTES).decode(errors="replace"), str(file))
    settings = plan["settings"] if isinstance(plan.get("settings"), dict) else {}
    own = {"base_model": plan.get("base_model"), "tuning_type": begun_by(path)}
    return {name: value for name, value in settings.items() if len(name) < 64} | own


def _finished(path: Path, name: str) -> RunSummary:
    try:
        stored = load_adapter(path)
    except (SoftPromptError, OSError) as error:
        return RunSummary(name, "broken", str(error))
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.tensors.values())
    manifest = stored.manifest
    recorded = {
        "method": stored.config.get("peft_type"),
        "num_virtual_tokens": stored.config.get("num_virtual_tokens"),
        "base_model": stored.base_model,
    }
    if manifest is None:
        return RunSummary(name, "finished", settings=recorded, bytes=size)
    train = manifest.data.get("train")
    data = {"train_data": train.get("path")} if isinstance(train, Mapping) else {}
    settings = {**_flat(manifest.settings), **data, **recorded}
    return RunSummary(
        name, "finished", settings=settings, metrics=manifest.metrics, bytes=size, created=manifest.created
    )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without tables, and data by name without its folder, as manifests have it."""
    found = dict(settings)
    inner = found.pop("tuning_config", None)
    found |= inner if isinstance(inner, Mapping) else {}
    found["method"] = found.pop("tuning_type", "PROMPT_TUNING")
    if isinstance(data := found.get("train_data"), str):
        found["train_data"] = Path(data).name
    return {name: value for name, value in found.items() if name not in _APART and value is not None}
