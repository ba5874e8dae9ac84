"""The data of a run, read and checked before any model is loaded."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from softprompt.data import (
    ALPACA,
    INPUT,
    DataSource,
    Located,
    Record,
    Verbalizer,
    check_label,
    data_fingerprint,
    label_set,
    opened,
    read_records,
    read_source,
    validation_split_of,
)
from softprompt.errors import ConfigError, DataError, TemplateError, UsageError
from softprompt.training.settings import TuneSettings

logger = logging.getLogger(__name__)

Rows: TypeAlias = DataSource
Data: TypeAlias = Rows | Mapping[str, Rows]
"""One data set, or one for each task by its name."""


@dataclass(frozen=True, slots=True)
class TaskData:
    """The examples of one task, what their targets are, and what identifies the files.

    ``name`` is empty for a single data set. ``beyond_limit`` are the labels of records that the limit leaves
    out and of no others.
    """

    name: str
    train: list[Record]
    validation: list[Record]
    labels: tuple[str, ...] | None
    template: str
    fingerprints: dict[str, Any]
    beyond_limit: tuple[str, ...] = ()

    @property
    def chats(self) -> bool:
        """Whether the examples are chats, for the chat template of a base that has one: no template was given."""
        return _are_chats(self.train, self.template)

    @property
    def plain_template(self) -> str:
        """The template for a base without a chat template; empty where there is none, for messages."""
        if not self.chats:
            return self.template
        first = self.train[0].fields
        return ALPACA if "instruction" in first else "{{input}}" if INPUT in first else ""

    @property
    def kind(self) -> str:
        """What the task is, as a manifest says it."""
        return "generation" if self.labels is None else "classification"


def named(data: Data) -> Mapping[str, Rows]:
    """Return data sets by task; a single one has the empty name.

    Raises:
        UsageError: no data set, or a name that is no text.
    """
    if not isinstance(data, Mapping) or hasattr(data, "column_names"):  # a DatasetDict has splits, not tasks
        return {"": cast(Rows, data)}
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
    if held_out and settings.validation_split is not None:
        raise UsageError("validation_data and validation_split both say what to validate on; give one of them")
    tasks = [_task(name, sets[name], held_out.get(name), settings) for name in sets]
    if settings.early_stopping_patience is not None and not all(task.validation for task in tasks):
        raise ConfigError("early_stopping_patience needs validation_data or validation_split")
    return tasks


def _names(sets: Mapping[str, Rows]) -> str:
    return ", ".join(name or "one without a name" for name in sets)


def _task(name: str, train: Rows, validation: Rows | None, settings: TuneSettings) -> TaskData:
    template = (settings.task_verbalizers or {}).get(name, settings.verbalizer)
    try:
        return _read_task(name, train, validation, settings, template)
    except (DataError, TemplateError) as error:
        if not name:
            raise
        raise type(error)(f"task {name}: {error}") from error


def _read_task(name: str, train: Rows, validation: Rows | None, settings: TuneSettings, template: str) -> TaskData:
    verbalizer = Verbalizer(template)
    source = opened(train)
    every = list(read_source(source, "train"))
    part = _read(train, every[: settings.limit], verbalizer, settings)
    labels = label_set(part.targets, task=settings.task)
    held_out: _Part | None = None
    if settings.validation_split is not None:
        part, held_out = _divided(part, settings, stratify=labels is not None)
    elif validation is not None:
        held_out = _read(validation, list(read_source(validation, "validation")), verbalizer, settings)
    elif (own := validation_split_of(source)) is not None:
        logger.info("the validation split of the training data is validated on")
        named_source = f"{train}:validation" if isinstance(train, str) else own
        held_out = _read(named_source, list(read_source(own)), verbalizer, settings)
    if labels is not None and held_out is not None:
        for place, target in zip(held_out.places, held_out.targets, strict=True):
            check_label(target, labels, f"validation data, {place.where}", "the training data")
    parts = {"train": part} | ({} if held_out is None else {"validation": held_out})
    return TaskData(
        name,
        part.records,
        [] if held_out is None else held_out.records,
        labels,
        template,
        {use: data_fingerprint(each.source, each.places) for use, each in parts.items()},
        _labels_beyond(every, settings),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """Records that were read for one use, and where each stood in the source."""

    source: Rows
    places: list[Located]
    records: list[Record]

    @property
    def targets(self) -> list[str]:
        return [str(record.target) for record in self.records]

    def of(self, numbers: Sequence[int]) -> _Part:
        """Return some of the records."""
        return _Part(self.source, [self.places[i] for i in numbers], [self.records[i] for i in numbers])


def _read(source: Rows, places: list[Located], verbalizer: Verbalizer, settings: TuneSettings) -> _Part:
    records = _records(places, settings)
    _check_template(verbalizer, records, settings)
    return _Part(source, places, records)


def _records(places: list[Located], settings: TuneSettings) -> list[Record]:
    return read_records(
        places,
        input_field=settings.input_field,
        output_field=settings.output_field,
        label_names=settings.label_names,
    )


def _divided(part: _Part, settings: TuneSettings, *, stratify: bool) -> tuple[_Part, _Part]:
    """Return the records to train on and those to validate on, each in their order.

    Of each label the same share is drawn; one that has a single record keeps it for training.

    Raises:
        ConfigError: There are too few records for it.
    """
    from sklearn.model_selection import train_test_split

    share, targets = settings.validation_split or 0.0, part.targets
    counts = Counter(targets)
    pool = [i for i, target in enumerate(targets) if not stratify or counts[target] > 1]
    classes = {targets[i] for i in pool} if stratify else {""}
    count = round(share * len(targets))
    if min(count, len(pool) - count) < len(classes):
        labels = f" of {len(classes)} labels" if stratify else ""
        raise ConfigError(
            f"validation_split {share:g} of {len(targets)} records{labels} leaves {count} to validate on and "
            f"{len(targets) - count} to train on, too few; change it, or give validation_data"
        )
    by_label = [targets[i] for i in pool] if stratify else None
    _, drawn = train_test_split(pool, test_size=count, random_state=settings.seed, stratify=by_label)
    logger.info(
        "validation data: %d of the %d records, drawn %swith seed %d",
        count,
        len(targets),
        "from each label " if stratify else "",
        settings.seed,
    )
    chosen = set(drawn)
    return part.of([i for i in range(len(targets)) if i not in chosen]), part.of(sorted(drawn))


def _labels_beyond(every: list[Located], settings: TuneSettings) -> tuple[str, ...]:
    """Return the labels that only records beyond the limit have; none where these cannot be read."""
    if settings.limit is None:
        return ()
    try:
        targets = [str(each.target) for each in _records(every, settings)]
    except DataError:
        return ()
    return tuple(sorted({*(label_set(targets, task=settings.task) or ())} - {*targets[: settings.limit]}))


def _are_chats(records: Sequence[Record], template: str) -> bool:
    return bool(records) and records[0].chat is not None and template == TuneSettings().verbalizer


def _check_template(verbalizer: Verbalizer, records: Sequence[Record], settings: TuneSettings) -> None:
    """Check a template against every record; chats have their own."""
    if _are_chats(records, verbalizer.template):
        return
    if settings.train_on is not None:
        raise ConfigError("train_on would be ignored: it is for chats that a chat template renders; leave it out")
    if records and records[0].chat is not None and not {INPUT, "instruction"} & {*records[0].fields}:
        raise ConfigError("verbalizer would be ignored: the base's chat template renders chats; leave it out")
    verbalizer.check(records, settings.output_field)
