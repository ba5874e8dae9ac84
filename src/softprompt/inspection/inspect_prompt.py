"""Looking at a prompt: at its values, at its training, and at what it does on some records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from softprompt.artifacts import StoredPrompt, load_adapter, other_base, outside
from softprompt.backbone import Base, load_base, replaced_modules
from softprompt.data import DataSource, read_source
from softprompt.engine import EngineRow
from softprompt.errors import BackboneError, ConfigError
from softprompt.evaluation import EvaluationSettings, read_numbered, with_columns
from softprompt.inference import Task, TunedPrompt, load, tuned_of, written
from softprompt.inspection import (
    KEYS_AND_VALUES,
    WORDS,
    Inspection,
    alike,
    attention_mass,
    contest,
    describe,
    drift_of,
    leave_one_out,
    numbers_of,
    parts_of,
    similarity_of,
)
from softprompt.progress import timed

LIMIT, NEAREST, LEFT_OUT_ROWS = 64, 5, 32
_WRITE_TEXT = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_OF_RECORDS = ("attention", "leave_one_out", "contest")


def inspect_prompt(
    prompt: str | Path | TunedPrompt,
    data: DataSource | None = None,
    *,
    against: Sequence[str | Path] = (),
    task_name: Task | None = None,
    limit: int = LIMIT,
    nearest: int = NEAREST,
    batch_size: int = 32,
    with_base: bool = True,
    silence_progress_bars: bool = False,
    **reading: Any,
) -> Inspection:
    """Look at what a prompt learned: its values, its training, and what it does on some records.

    What needs the base is left out where that cannot be loaded, what needs records where there are none, and what
    a kind of prompt does not have; ``missing`` says why.

    Args:
        prompt: Folder of the prompt, a name on the Hub, or a prompt in memory.
        data: Records with targets; read as in ``evaluate``.
        against: Other prompts to set it against.
        task_name: The task of a multitask prompt that the records are of.
        limit: Records to look at, at most, evenly spaced over the data.
        nearest: Vocabulary tokens to name for each virtual token.
        batch_size: Rows, or (row, label) pairs, in one pass.
        with_base: Load the base model.
        silence_progress_bars: Show no progress.
        **reading: How the base is read, as for ``load``: ``base_model``, ``torch_dtype``, ``device``,
            ``tokenizer``, ``ignore_fingerprint``.

    Raises:
        ArtifactError: The prompt, or one of the others, cannot be read.
        BackboneError: A base that is named here cannot be loaded, or is not the prompt's.
        ConfigError: A number is out of range, or there is no such task.
        DataError: The data cannot be read.
    """
    for name, number in (("limit", limit), ("nearest", nearest), ("batch_size", batch_size)):
        if number < 1:
            raise ConfigError(f"{name} expects at least 1, got {number}")
    with timed(silent=silence_progress_bars), TemporaryDirectory() as folder:
        if isinstance(prompt, TunedPrompt):
            prompt.save(folder)
        stored = load_adapter(folder if isinstance(prompt, TunedPrompt) else prompt)
        others = {str(each): load_adapter(each) for each in against}
        found = Inspection(describe(stored))
        tuned = prompt if isinstance(prompt, TunedPrompt) else None
        base = None if tuned is None else tuned.base
        if tuned is None:
            base, tuned = _opened(found, stored, with_base, reading)
        _look_at_values(found, stored, others, base, nearest)
        manifest = stored.manifest
        found.history, metrics = (manifest.history, manifest.metrics) if manifest else ([], {})
        if not found.history:
            found.missing["history"] = "no training is on record"
        found.drift = found.tried("drift", lambda: drift_of(found.history, metrics))
        if tuned is not None and (chosen := _of_task(found, tuned, task_name)) is not None:
            named = _words(found, chosen)
            if data is None:
                found.lack("no data was given (--data)", *_OF_RECORDS)
            else:
                _look_at_answers(found, chosen, named | _loaded(found, chosen, others), data, limit, batch_size)
    return found


def _opened(
    found: Inspection, stored: StoredPrompt, with_base: bool, reading: dict[str, Any]
) -> tuple[Base | None, TunedPrompt | None]:
    """Return the base, and the prompt on it, as far as they can be had; note what cannot, and why."""
    named, task = reading.pop("base_model", None), stored.config.get("task_type")
    name = named or stored.base_model
    try:
        if not with_base or name is None:
            raise BackboneError(
                "left out as asked" if name else "the prompt names none; give base_model (--base-model)"
            )
        name = named or outside(name, stored.location)
        if task in _WRITE_TEXT:
            tuned = load(stored.location, name, **reading)
            return tuned.base, tuned
        reading.pop("ignore_fingerprint", None)
        base = load_base(name, **reading)
    except BackboneError as error:
        if named is not None and with_base:
            raise
        found.lack(f"without its base: {error}", "nearest", "words", *_OF_RECORDS)
        return None, None
    found.lack(f"a {task} prompt writes no text; attach it with PeftModel.from_pretrained", "words", *_OF_RECORDS)
    return base, None


def _look_at_values(
    found: Inspection, stored: StoredPrompt, others: Mapping[str, StoredPrompt], base: Base | None, nearest: int
) -> None:
    parts = parts_of(stored)
    if list(parts) == [KEYS_AND_VALUES]:
        found.missing["nearest"] = "keys and values of layers have no neighbours in the vocabulary"
        base = None
    elif base is not None and base.embedding.weight.shape[1] != stored.values.shape[1]:
        found.missing["nearest"] = "the base's embeddings are of another width; load the prompt's own base"
        base = None
    found.values = {name: numbers_of(values, base, nearest) for name, values in parts.items()}
    similar = [similarity_of(parts[one], parts[two], one, two) for one, two in combinations(parts, 2)]
    for name, other in others.items():
        section = f"similarity with {name}"
        if (reason := other_base(stored, other)) is not None:
            found.missing[section] = reason
            continue
        cosines = found.tried(section, partial(alike, parts, other, name))
        if cosines == []:
            found.missing[section] = "its virtual tokens stand elsewhere in the model, or are of other tasks"
        similar += cosines or []
    found.similarity = similar


def _of_task(found: Inspection, tuned: TunedPrompt, task: Task | None) -> TunedPrompt | None:
    """Return the prompt as used for a task; None, with a note, where there are several and none is chosen."""
    several = tuned.module.num_tasks > 1
    if several and task is None and tuned.task is None:
        why = f"the prompt has the tasks {', '.join(tuned.task_names)}; choose one: task_name (--task-name)"
        found.lack(why, "words", *_OF_RECORDS)
        return None
    chosen = tuned.of_task(task)
    found.task_name = tuned.task_names[chosen.task or 0] if several else None
    return chosen


def _words(found: Inspection, tuned: TunedPrompt) -> dict[str, TunedPrompt]:
    """Return the nearest discrete prompt: the base with the nearest tokens where a text would stand."""
    names = (f"{found.task_name}", f"{found.task_name}, input", "input")
    part = next((found.values[name] for name in names if name in found.values), None)
    if part is None or part.nearest is None:
        found.missing["words"] = found.missing.get("nearest", "no virtual tokens stand in the input")
        return {}
    ids = [row[0].token_id for row in part.nearest]
    found.words = str(tuned.tokenizer.decode(ids))
    in_chat = tuned.rows.placement == "chat_system"
    return {WORDS: written(tuned.base, tuned.manifest, ids, chat=in_chat)}


def _loaded(found: Inspection, tuned: TunedPrompt, others: Mapping[str, StoredPrompt]) -> dict[str, TunedPrompt]:
    """Return the other prompts that answer the same records with the same labels on the same base."""

    def on_base(stored: StoredPrompt) -> TunedPrompt:
        other = tuned_of(stored, tuned.base)
        other = other.of_task(found.task_name if other.module.num_tasks > 1 else None)
        if (other.manifest.task, set(other.labels or ())) != (tuned.manifest.task, set(tuned.labels or ())):
            raise ConfigError("it answers another task, or with other labels")
        return other

    answering = {
        name: found.tried(f"contest with {name}", partial(on_base, stored)) for name, stored in others.items()
    }
    return {name: other for name, other in answering.items() if other is not None}


def _look_at_answers(
    found: Inspection,
    tuned: TunedPrompt,
    others: Mapping[str, TunedPrompt],
    data: DataSource,
    limit: int,
    batch_size: int,
) -> None:
    every = list(read_source(data, "test"))
    step = max(1.0, len(every) / limit)
    numbers = [int(i * step) for i in range(min(limit, len(every)))]
    chosen = [every[number] for number in numbers]
    how = with_columns(EvaluationSettings(), [tuned])
    records = [each.record for each in read_numbered(chosen, how, None)]
    tuned.rows.check(records, how.target_field)
    prompt = tuned.prompt()
    rows = [
        EngineRow(row.source, row.target, prompt, row.at, row.unscored) for row in tuned.rows.tokenize(records)[0]
    ]
    found.records = len(rows)
    some = rows[:: -(-len(rows) // LEFT_OUT_ROWS)]
    with replaced_modules(tuned.base, tuned.heads):
        found.attention = found.tried("attention", lambda: attention_mass(tuned.base, rows))
        found.leave_one_out = found.tried("leave_one_out", lambda: leave_one_out(tuned, some, batch_size))
    places = [number + 1 for number in numbers]
    found.contest = found.tried("contest", lambda: contest(tuned, others, chosen, places, batch_size=batch_size))
