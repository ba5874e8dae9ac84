"""The data of a run, read and checked before any model is loaded; and its first records as a start."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from softprompt.data import (
    ALPACA,
    INPUT,
    Record,
    RowTokenizer,
    TokenRow,
    Verbalizer,
    data_fingerprint,
    label_set,
    read_records,
    read_source,
)
from softprompt.errors import ConfigError, DataError, TemplateError, UsageError, nearest
from softprompt.prompts import CPTConfig
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
        raise ConfigError("early_stopping_patience needs validation_data: nothing is split off the training data")
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
    examples = read_records(source, input_field=settings.input_field, output_field=settings.output_field)
    _check_template(verbalizer, examples, settings)
    return examples


def _are_chats(examples: Sequence[Record], template: str) -> bool:
    return bool(examples) and examples[0].chat is not None and template == TuneSettings().verbalizer


def _check_template(verbalizer: Verbalizer, examples: Sequence[Record], settings: TuneSettings) -> None:
    """Check a template against every record; chats have their own."""
    if _are_chats(examples, verbalizer.template):
        return
    if settings.train_on is not None:
        raise ConfigError("train_on would be ignored: it is for chats that a chat template renders; leave it out")
    if examples and examples[0].chat is not None and not {INPUT, "instruction"} & {*examples[0].fields}:
        raise ConfigError("verbalizer would be ignored: the base's chat template renders chats; leave it out")
    verbalizer.check(examples, settings.output_field)


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


_BEFORE, _INPUT, _AFTER, _LABEL = 1, 2, 3, 4
"""What a token of an example is: template before the input, input, template behind it, label."""


def first_tokens(rows: Sequence[TokenRow], count: int, tokenizer: RowTokenizer) -> list[int]:
    """Return tokens of the first records, one behind the other; repeated where there are too few.

    Args:
        rows: The records, at least one.
        count: Tokens wanted.
        tokenizer: What tokenised the records.
    """
    ids: list[int] = []
    for number, row in enumerate(rows):
        ids += (*row.source[_starts_text(row, number, tokenizer) :], *row.target)
        if len(ids) >= count:
            break
    return (ids * -(-count // len(ids)))[:count]


def with_context(
    config: CPTConfig, rows: Sequence[TokenRow], tokenizer: RowTokenizer, *, count: int, room: int | None
) -> tuple[CPTConfig, int]:
    """Return a configuration whose context is the first records, and how many these are.

    Args:
        config: The other options.
        rows: The records, at least one.
        tokenizer: What tokenised the records; tells the template's tokens from the input's.
        count: Records wanted.
        room: Tokens that the context may have; one record is taken whether it fits or not. None is no limit.
    """
    ids: list[int] = []
    kinds: list[int] = []
    used = 0
    for number, row in enumerate(rows[:count]):
        own_ids, own_kinds = _example(row, number, tokenizer)
        if used and room is not None and len(ids) + len(own_ids) > room:
            break
        ids += own_ids
        kinds += own_kinds
        used += 1
    made = dataclasses.replace(
        config, num_virtual_tokens=None, cpt_token_ids=ids, cpt_mask=None, cpt_tokens_type_mask=kinds
    )
    return made, used


def _example(row: TokenRow, number: int, tokenizer: RowTokenizer) -> tuple[list[int], list[int]]:
    """Return the tokens of a record and what each of them is, as ``cpt_tokens_type_mask`` has it."""
    empty, _ = tokenizer.source(dict.fromkeys(tokenizer.verbalizer.fields, ""))
    most = min(len(row.source), len(empty))
    before = _shared(row.source, empty, most)
    after = _shared(row.source[::-1], empty[::-1], most - before)
    inside = len(row.source) - before - after
    kinds = [_BEFORE] * before + [_INPUT] * inside + [_AFTER] * after + [_LABEL] * len(row.target)
    start = _starts_text(row, number, tokenizer)
    ids = [*row.source, *row.target]
    return ids[start:], [kind + _LABEL * number for kind in kinds[start:]]


def _shared(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """Return how many tokens two texts have in common at their start."""
    pairs = zip(one[:most], other[:most], strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), most)


def _starts_text(row: TokenRow, number: int, tokenizer: RowTokenizer) -> int:
    """Return how many tokens to leave out: the token that starts every text stands in front alone."""
    bos = tokenizer.tokenizer.bos_token_id
    return int(number > 0 and bos is not None and row.source[:1] == (bos,))
