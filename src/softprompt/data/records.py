"""Records, from a file, from memory or a ``datasets.Dataset``: text fields and a target, whatever their names."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from softprompt.data.chats import CHAT_COLUMNS, Chat, chat_of, check_length, is_chat
from softprompt.data.file_formats import Located
from softprompt.data.sources import DataSource, Use, read_source
from softprompt.errors import ConfigError, DataError, broken, nearest

LabelNames: TypeAlias = Mapping[str, str] | Mapping[int, str] | Sequence[str]
"""Names of targets by these, or those of 0, 1 and so on."""

INPUT, TARGET = "input", "output"
_PAIRS = ((INPUT, TARGET), ("text", "labels"), ("text", "label"))


@dataclass(frozen=True, slots=True)
class Record:
    """One example of a data set, its values as text.

    Attributes:
        fields: Every column but the target, and ``input`` whatever the input column is called.
        target: The wanted answer; None where the data has none.
        left_out: Columns whose values are no text, such as lists, and the types of these.
        chat: The messages, where the columns hold a chat, or an instruction that can be one.
    """

    fields: Mapping[str, str]
    target: str | None
    left_out: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    chat: Chat | None = field(default=None, repr=False)


def read_records(
    source: DataSource,
    *,
    input_field: str | None = None,
    output_field: str | None = None,
    require_target: bool = True,
    label_names: LabelNames | None = None,
    use: Use | None = None,
) -> list[Record]:
    """Read every record of ``source``.

    Args:
        source: Anything that ``read_source`` reads, or what it gave.
        input_field: The input column; ``input`` or ``text`` when not named, none where neither is there.
        output_field: The target column; ``output``, ``labels`` or ``label`` when not named.
        require_target: Refuse records without a target.
        label_names: Names of targets, such as ``{0: "negative", 1: "positive"}``.
        use: Which split of several is read.

    Raises:
        DataError: The source cannot be read, or a record lacks or misuses a field; the message
            names the file and the line.
    """
    records: list[Record] = []
    columns: Columns | None = None
    names = {} if label_names is None else names_of_labels(label_names)
    for located in read_source(source, use):
        if columns is None:
            columns = choose_columns(located, input_field, output_field, require_target=require_target)
        records.append(_record(located, columns, names, require_target=require_target))
    return records


def names_of_labels(names: Any) -> dict[str, str]:
    """Return names of targets by the texts of these; a list has the names of 0, 1 and so on.

    Raises:
        ConfigError: They are no mapping of targets to names.
    """
    found = dict(enumerate(names)) if isinstance(names, list | tuple) else names
    if not isinstance(found, Mapping) or not all(isinstance(name, str) and name.strip() for name in found.values()):
        raise ConfigError(f"label_names takes names such as {{0: 'negative', 1: 'positive'}}; got {names!r}")
    return {str(target): name for target, name in found.items()}


def _record(located: Located, columns: Columns, label_names: Mapping[str, str], *, require_target: bool) -> Record:
    if columns.chat:
        if label_names:
            raise ConfigError("label_names would be ignored: the answers are turns of chats; leave it out")
        return _chat_record(located, columns.chat, require_target=require_target)
    fields, left_out = _fields(located, (columns.target,), columns.input)
    if columns.input is not None:
        if columns.input not in fields:
            raise DataError(f"{located.where}: {_lack(columns.input, located.record)}")
        fields[INPUT] = fields[columns.input]
    return Record(fields, _target(located, columns, label_names, require_target=require_target), left_out)


def _chat_record(located: Located, columns: tuple[str, ...], *, require_target: bool) -> Record:
    """Return a record of a chat; its texts are fields as well, for templates and bases that take no chats."""
    chat = chat_of(located.record, located.where, columns)
    if require_target and not (chat.answer or "").strip():
        raise DataError(f"{located.where}: expected an answer, a turn of the assistant, in {columns[-1]!r}")
    fields, left_out = _fields(located, columns[1:] if len(columns) > 1 else columns)
    if columns[0] in fields and columns[0] != "instruction":
        fields[INPUT] = fields[columns[0]]
    return Record(fields, chat.answer, left_out, chat)


def _fields(
    located: Located, apart: Sequence[str | None], needed: str | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the texts of all columns but those ``apart``, and the types of values that are none."""
    record = {name: value for name, value in located.record.items() if name not in apart}
    left_out = {n: type(value).__name__ for n, value in record.items() if n != needed and not _is_scalar(value)}
    texts = {name: _text(value, name, located.where) for name, value in record.items() if name not in left_out}
    return {name: text for name, text in texts.items() if text is not None}, left_out


def _target(
    located: Located, columns: Columns, label_names: Mapping[str, str], *, require_target: bool
) -> str | None:
    if columns.target is None:
        return None
    value = located.record.get(columns.target)
    values = value if columns.target == "labels" and isinstance(value, list | tuple) else [value]
    parts = [_text(each, columns.target, located.where) for each in values]
    text = ",".join(_named(part, label_names, located.where) for part in parts if part is not None)
    if text.strip():
        return text
    if require_target:
        raise DataError(f"{located.where}: {_lack(columns.target, located.record)}")
    return None


def _named(target: str, names: Mapping[str, str], where: str) -> str:
    """Return the name of a target; one that is a name already stays."""
    if not names or target in names.values() or not target.strip():
        return target
    if target not in names:
        raise DataError(
            f"{where}: the target {target!r} has no name in label_names, which has {', '.join(names)}"
            f"{nearest(target, names)}; add it"
        )
    return names[target]


def _lack(name: str, record: Mapping[str, Any]) -> str:
    if name in record:
        return f"expected a value in the field {name!r}, got {record[name]!r}"
    return f"expected the field {name!r}, got {', '.join(record)}{nearest(name, record)}"


_SCALARS = (str, bool, int, float, type(None))


def _scalar(value: Any) -> Any:
    """Return a value of NumPy or of a tensor without dimensions as Python's."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _is_scalar(value: Any) -> bool:
    return isinstance(_scalar(value), _SCALARS)


def _text(value: Any, name: str, where: str) -> str | None:
    """Return a scalar as text, None for a null; numbers as JSON would spell them."""
    scalar = _scalar(value)
    if isinstance(scalar, str):
        if problem := broken(scalar):
            raise DataError(f"{where}: the field {name!r} holds {problem}; correct the record or leave it out")
        check_length(scalar, f"the field {name!r}", where)
        return scalar
    if scalar is None or (isinstance(scalar, float) and math.isnan(scalar)):
        return None
    if isinstance(scalar, bool | int | float):
        try:
            return json.dumps(scalar)
        except ValueError as error:  # Python writes no number of more than 4,300 digits
            raise DataError(
                f"{where}: the number in the field {name!r} has too many digits; write it as text"
            ) from error
    raise DataError(
        f"{where}: expected text or a number in the field {name!r}, got a value of type {type(scalar).__name__}"
    )


@dataclass(frozen=True, slots=True)
class Columns:
    """The input and target column of a source, decided once from its first record.

    Attributes:
        input: The column that ``{{input}}`` stands for, or None where the template has to name its own.
        target: The column that holds the answer, or None where there is none.
        chat: The columns of a chat; empty where there is none.
    """

    input: str | None
    target: str | None
    chat: tuple[str, ...] = ()


def choose_columns(
    first: Located, input_field: str | None, output_field: str | None, *, require_target: bool
) -> Columns:
    """Decide the columns: named ones, else ``input``/``output``, else ``text`` with ``labels`` or ``label``.

    Raises:
        DataError: A named column is missing, or what is there leaves the choice open.
    """
    present = list(first.record)
    if found := _chat_columns(first, input_field, output_field):
        return Columns(found[0], found[-1], found)
    if require_target and input_field is None and output_field is None:
        return _whole_pair(first)
    source = _input_column(first, input_field, output_field)
    if input_field is not None and INPUT in present and source != INPUT:
        raise DataError(
            f"{first.where}: input_field={source!r} clashes with the column 'input', both would be "
            "{{input}}; leave input_field out and name the columns in the verbalizer"
        )
    target = _target_column(first, source, output_field, require_target=require_target)
    if target is not None and target == source:
        raise DataError(f"{first.where}: the column {source!r} cannot be input and target at once")
    return Columns(source, target)


def _chat_columns(first: Located, input_field: str | None, output_field: str | None) -> tuple[str, ...]:
    """Return the columns of a chat: named ones that hold messages, or those known by their names."""
    if input_field is not None or output_field is not None:
        named = tuple(name for name in (input_field, output_field) if name is not None)
        return named if input_field is not None and is_chat(first.record.get(input_field)) else ()
    found = [each for each in CHAT_COLUMNS if {*each} <= {*first.record}]
    pairs = [pair for pair in _PAIRS if {*pair} <= {*first.record}]
    if ("instruction", "output") in found:
        pairs = []  # its input column is a part of it, and its text column a rendered one
    if len(found) + len(pairs) > 1 and found:
        raise DataError(
            f"{first.where}: {' or '.join('/'.join(each) for each in (*found, *pairs))} could be the records; name "
            "the columns with input_field and output_field"
        )
    return found[0] if found else ()


def _whole_pair(first: Located) -> Columns:
    present = list(first.record)
    whole = [pair for pair in _PAIRS if {*pair} <= {*present}]
    if whole and (whole[0][0] == INPUT or (len(whole) == 1 and INPUT not in present)):
        return Columns(*whole[0])
    targets = [target for _, target in _PAIRS if target in present]
    if len(targets) == 1 and not any(source in present for source, _ in _PAIRS):
        return Columns(None, targets[0])
    begun = [pair for pair in _PAIRS if {*pair} & {*present}]
    wanted = [name for pair in begun or _PAIRS for name in pair if name not in present]
    raise DataError(
        f"{first.where}: expected the fields input and output, text and labels, or text and label, got "
        f"{_listed(present)}{_first_hint(wanted, present)}; name them with input_field and "
        "output_field"
    )


def _input_column(first: Located, named: str | None, output_field: str | None) -> str | None:
    present = list(first.record)
    if named is not None:
        _require(named, "input_field", first)
        return named
    found = list(dict.fromkeys(source for source, _ in _PAIRS if source in present and source != output_field))
    if len(found) == 2 and not (_PAIRS[0][1] in present and output_field in (None, _PAIRS[0][1])):
        raise DataError(
            f"{first.where}: both input and text could be the input among {_listed(present)}; "
            "name one with input_field"
        )
    return found[0] if found else None


def _target_column(first: Located, source: str | None, named: str | None, *, require_target: bool) -> str | None:
    present = list(first.record)
    if named is not None:
        if named in present or not require_target:
            return named
        _require(named, "output_field", first)
    found = [target for of, target in _PAIRS if of == source and target in present]
    found = found or [target for _, target in _PAIRS if target in present and target != source]
    if len(found) == 1:
        return found[0]
    if not require_target:  # the first record need not have one
        return _PAIRS[0][1] if source == INPUT and not found else None
    problem = f"both {' and '.join(found)} could be the target" if found else "no field output, labels or label"
    raise DataError(
        f"{first.where}: {problem} among {_listed(present)}"
        f"{_first_hint([target for _, target in _PAIRS], present) if not found else ''}; "
        "name one with output_field"
    )


def _require(name: str, option: str, first: Located) -> None:
    present = list(first.record)
    if name not in present:
        raise DataError(
            f"{first.where}: expected the field {name!r} ({option}), got {_listed(present)}{nearest(name, present)}"
        )


def _first_hint(wanted: Iterable[str], present: list[str]) -> str:
    return next((hint for name in wanted if (hint := nearest(name, present))), "")


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "no fields"


Task: TypeAlias = Literal["classification", "generation"]

MOST_LABELS = 100
LONGEST_LABEL = 64  # characters
FEWEST_RECORDS_PER_LABEL = 2.0


def check_label(target: str, labels: Sequence[str], where: str, whose: str) -> None:
    """Raise ``DataError``, with the nearest label, where a target is none of those of ``whose`` examples."""
    if target not in labels:
        raise DataError(
            f"{where}: {target!r} is not among the {len(labels)} labels of {whose}{nearest(target, labels)}; "
            "correct it, or set task to 'generation'"
        )


def label_set(targets: Sequence[str], *, task: Task | None = None) -> tuple[str, ...] | None:
    """Return the sorted labels of a classification task, or None for free text.

    ``task`` decides when it is given. Otherwise the targets are labels when all of this holds:

    - there are at least 2 and at most 100 distinct ones,
    - each occurs at least twice on average,
    - each is one line of at most 64 characters.

    Raises:
        ConfigError: ``task`` is not a task.
        DataError: ``task`` is classification, and there is only one label.
    """
    if task not in (None, "classification", "generation"):
        raise ConfigError(
            f"expected task 'classification' or 'generation', got {task!r}"
            f"{nearest(str(task), ('classification', 'generation'))}"
        )
    if task == "generation":
        return None
    labels = tuple(sorted(set(targets)))
    if task == "classification":
        if len(labels) < 2:
            raise DataError(
                f"classification needs at least 2 distinct targets, got {len(labels)}: "
                f"{', '.join(map(repr, labels)) or 'none'}; add records or set task to 'generation'"
            )
        return labels
    few = 2 <= len(labels) <= MOST_LABELS
    often = len(targets) >= FEWEST_RECORDS_PER_LABEL * len(labels)
    short = all(len(label) <= LONGEST_LABEL and "\n" not in label for label in labels)
    return labels if few and often and short else None
