"""The data of a run, read and checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from softprompt.data import (
    Record,
    Verbalizer,
    data_fingerprint,
    label_set,
    read_records,
    read_source,
)
from softprompt.errors import ConfigError, DataError, TemplateError, UsageError, nearest
from softprompt.training.settings import TuneSettings

Rows: TypeAlias = str | Path | Iterable[Mapping[str, Any]]
Data: TypeAlias = Rows | Mapping[str, Rows]
"""One data set, or one for each task by its name."""


@dataclass(frozen=True, slots=True)
class TaskData:
    """The examples of one task, what their targets are, and what identifies the files.

    ``name`` is empty for a single data set.
    """

    name: str
    train: list[Record]
    validation: list[Record]
    labels: tuple[str, ...] | None
    template: str
    fingerprints: dict[str, Any]

    @property
    def kind(self) -> str:
        """What the task is, as a manifest says it."""
        return "generation" if self.labels is None else "classification"


def named(data: Data) -> Mapping[str, Rows]:
    """Return data sets by task; a single one has the empty name.

    Raises:
        UsageError: no data set, or a name that is no text.
    """
    if not isinstance(data, Mapping):
        return {"": data}
    if not data:
        raise UsageError("train_data is an empty mapping; give {task: data}")
    for name in data:
        if not isinstance(name, str) or not name.strip():
            raise UsageError(f"task names are texts; got {name!r}")
    return data


def read_data(train: Data, validation: Data | None, settings: TuneSettings) -> list[TaskData]:
    """Read and check the data sets against their verbalizers.

    Raises:
        DataError: a file or a record cannot be used.
        TemplateError: a verbalizer does not fit the records.
        ConfigError: settings that do not fit the data sets.
    """
    sets = named(train)
    held_out: Mapping[str, Rows] = {} if validation is None else named(validation)
    if held_out and set(held_out) != set(sets):
        raise UsageError(
            f"train_data and validation_data hold different tasks ({_names(sets)} and "
            f"{_names(held_out)}); give both the same task names, or leave validation_data out"
        )
    settings.check_tasks([name for name in sets if name])
    if validation is None and settings.early_stopping_patience is not None:
        raise ConfigError(
            "early_stopping_patience needs validation_data: nothing is split off the training data"
        )
    return [_task(name, sets[name], held_out.get(name), settings) for name in sets]


def _names(sets: Mapping[str, Rows]) -> str:
    return ", ".join(name or "one without a name" for name in sets)


def _task(name: str, train: Rows, validation: Rows | None, settings: TuneSettings) -> TaskData:
    template = (settings.task_verbalizers or {}).get(name, settings.verbalizer)
    try:
        verbalizer = Verbalizer(template)
        examples = _read(train, verbalizer, settings)
        held_out = [] if validation is None else _read(validation, verbalizer, settings)
        labels = label_set([str(example.target) for example in examples], task=settings.task)
        if labels is not None and validation is not None:
            _check_labels(validation, held_out, labels)
    except (DataError, TemplateError) as error:
        if not name:
            raise
        raise type(error)(f"task {name}: {error}") from error
    fingerprints: dict[str, Any] = {"train": data_fingerprint(train)}
    if validation is not None:
        fingerprints["validation"] = data_fingerprint(validation)
    return TaskData(name, examples, held_out, labels, template, fingerprints)


def _read(source: Rows, verbalizer: Verbalizer, settings: TuneSettings) -> list[Record]:
    examples = read_records(
        source, input_field=settings.input_field, output_field=settings.output_field
    )
    verbalizer.check(examples, settings.output_field)
    return examples


def _check_labels(source: Rows, examples: Sequence[Record], labels: tuple[str, ...]) -> None:
    for number, example in enumerate(examples):
        if example.target not in labels:
            target = str(example.target)
            place = next(islice(read_source(source), number, None)).where
            raise DataError(
                f"validation data, {place}: {target!r} is not among the {len(labels)} labels of "
                f"the training data{nearest(target, labels)}; correct it, or set task to "
                "'generation'"
            )
