"""Records, from a file, from memory or a ``datasets.Dataset``: text fields and a target, whatever their names."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from softprompt.data.chats import CHAT_COLUMNS, Chat, chat_of, is_chat
from softprompt.data.file_formats import BINARY_READERS, SUFFIXES, TEXT_READERS, Located, as_record, not_utf8
from softprompt.errors import ConfigError, DataError, broken, nearest

DataSource: TypeAlias = str | Path | Iterable[Mapping[str, Any]]

INPUT = "input"
_PAIRS = ((INPUT, "output"), ("text", "labels"))


@dataclass(frozen=True, slots=True)
class Record:
    """One example of a data set, its values as text.

    Attributes:
        fields: Every column but the target, and ``input`` whatever the input column is called.
        target: The wanted answer; None where the data has none.
        chat: The messages, where the columns hold a chat, or an instruction that can be one.
    """

    fields: Mapping[str, str]
    target: str | None
    chat: Chat | None = field(default=None, repr=False)


def read_records(
    source: DataSource,
    *,
    input_field: str | None = None,
    output_field: str | None = None,
    require_target: bool = True,
) -> list[Record]:
    """Read every record of ``source``.

    Args:
        source: A path to JSONL, JSON, CSV, TSV, Parquet, Arrow or Feather, an iterable of
            mappings, or a ``datasets.Dataset``.
        input_field: The input column; ``input`` or ``text`` when not named.
        output_field: The target column; ``output`` or ``labels`` when not named.
        require_target: Refuse records without a target.

    Raises:
        DataError: The source cannot be read, or a record lacks or misuses a field; the message
            names the file and the line.
    """
    records: list[Record] = []
    columns: Columns | None = None
    for located in read_source(source):
        if columns is None:
            columns = choose_columns(located, input_field, output_field, require_target=require_target)
        records.append(_record(located, columns, require_target=require_target))
    return records


def data_fingerprint(source: DataSource) -> dict[str, str | int]:
    """Return what identifies the data: ``path`` (a name, no folders), ``sha256`` and ``rows``.

    Raises:
        DataError: The source cannot be read, or can be read only once.
    """
    if isinstance(source, Iterator):
        raise DataError("expected records that can be read twice, got an iterator; pass a list")
    records = [dict(located.record) for located in read_source(source)]
    if isinstance(source, str | Path):
        name, content = Path(source).name, Path(source).read_bytes()
    else:
        name = "rows in memory"
        content = json.dumps(records, sort_keys=True, default=str).encode()
    return {"path": name, "sha256": hashlib.sha256(content).hexdigest(), "rows": len(records)}


def _record(located: Located, columns: Columns, *, require_target: bool) -> Record:
    record = located.record
    if columns.chat:
        return _chat_record(located, columns.chat, require_target=require_target)
    fields = {
        name: text
        for name, value in record.items()
        if name != columns.target and (text := _text(value, name, located.where)) is not None
    }
    if columns.input not in fields:
        raise DataError(f"{located.where}: {_lack(columns.input, record)}")
    fields[INPUT] = fields[columns.input]
    return Record(fields, _target(located, columns, require_target=require_target))


def _chat_record(located: Located, columns: tuple[str, ...], *, require_target: bool) -> Record:
    """Return a record of a chat; its texts are fields as well, for templates and bases that take no chats."""
    chat = chat_of(located.record, located.where, columns)
    if require_target and not (chat.answer or "").strip():
        raise DataError(f"{located.where}: expected an answer, a turn of the assistant, in {columns[-1]!r}")
    own = columns[1:] if len(columns) > 1 else columns
    fields = {
        name: text
        for name, value in located.record.items()
        if name not in own
        and not isinstance(value, list | tuple | Mapping)
        and (text := _text(value, name, located.where)) is not None
    }
    if columns[0] in fields and columns[0] != "instruction":
        fields[INPUT] = fields[columns[0]]
    return Record(fields, chat.answer, chat=chat)


def _target(located: Located, columns: Columns, *, require_target: bool) -> str | None:
    if columns.target is None:
        return None
    value = located.record.get(columns.target)
    if columns.target == "labels" and isinstance(value, list | tuple):
        parts = [_text(part, columns.target, located.where) for part in value]
        text = ",".join(part for part in parts if part is not None)
    else:
        text = _text(value, columns.target, located.where) or ""
    if text.strip():
        return text
    if require_target:
        raise DataError(f"{located.where}: {_lack(columns.target, located.record)}")
    return None


def _lack(name: str, record: Mapping[str, Any]) -> str:
    if name in record:
        return f"expected a value in the field {name!r}, got {record[name]!r}"
    return f"expected the field {name!r}, got {', '.join(record)}{nearest(name, record)}"


def _text(value: Any, name: str, where: str) -> str | None:
    """Return a scalar as text, None for a null; numbers as JSON would spell them."""
    scalar = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
    if isinstance(scalar, str):
        if problem := broken(scalar):
            raise DataError(f"{where}: the field {name!r} holds {problem}; correct the record or leave it out")
        return scalar
    if scalar is None or (isinstance(scalar, float) and math.isnan(scalar)):
        return None
    if isinstance(scalar, bool | int | float):
        return json.dumps(scalar)
    raise DataError(
        f"{where}: expected text or a number in the field {name!r}, got a value of type {type(scalar).__name__}"
    )


@dataclass(frozen=True, slots=True)
class Columns:
    """The input and target column of a source, decided once from its first record.

    Attributes:
        input: The column that ``{{input}}`` stands for.
        target: The column that holds the answer, or None where there is none.
        chat: The columns of a chat; empty where there is none.
    """

    input: str
    target: str | None
    chat: tuple[str, ...] = ()


def choose_columns(
    first: Located, input_field: str | None, output_field: str | None, *, require_target: bool
) -> Columns:
    """Decide the columns: named ones, else ``input``/``output``, else ``text``/``labels``.

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
    if target == source:
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
    for source, target in _PAIRS:
        if source in present and target in present:
            if source != INPUT and INPUT in present:
                break
            return Columns(source, target)
    wanted = [name for pair in _PAIRS for name in pair if name not in present]
    raise DataError(
        f"{first.where}: expected the fields input and output, or text and labels, got "
        f"{_listed(present)}{_first_hint(wanted, present)}; name them with input_field and "
        "output_field"
    )


def _input_column(first: Located, named: str | None, output_field: str | None) -> str:
    present = list(first.record)
    if named is not None:
        _require(named, "input_field", first)
        return named
    found = [source for source, _ in _PAIRS if source in present and source != output_field]
    if len(found) == 2 and _PAIRS[0][1] in present and output_field in (None, _PAIRS[0][1]):
        return INPUT
    if len(found) == 1:
        return found[0]
    problem = "both input and text could be the input" if found else "no field input or text"
    raise DataError(
        f"{first.where}: {problem} among {_listed(present)}"
        f"{_first_hint([source for source, _ in _PAIRS], present) if not found else ''}; "
        "name one with input_field"
    )


def _target_column(first: Located, source: str, named: str | None, *, require_target: bool) -> str | None:
    present = list(first.record)
    if named is not None:
        if named in present or not require_target:
            return named
        _require(named, "output_field", first)
    of_pair = dict(_PAIRS).get(source)
    if of_pair in present:
        return of_pair
    found = [target for _, target in _PAIRS if target in present and target != source]
    if len(found) == 1:
        return found[0]
    if not found and not require_target:
        return None
    problem = "both output and labels could be the target" if found else "no field output or labels"
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


def read_source(source: DataSource) -> Iterator[Located]:
    """Yield the records of ``source`` with where each was read; at least one.

    Args:
        source: A path (its suffix names the format), an iterable of mappings, or a ``datasets.Dataset``.

    Raises:
        DataError: The source is missing, empty, of an unknown format, or damaged.
    """
    if isinstance(source, str | Path):
        yield from _at_least_one(_file_records(Path(source)), f"{Path(source).name}")
    else:
        yield from _at_least_one(_memory_records(source), "the data")


def _at_least_one(records: Iterator[Located], name: str) -> Iterator[Located]:
    found = False
    for record in records:
        found = True
        yield record
    if not found:
        raise DataError(f"{name}: expected at least one record, got none")


def _file_records(path: Path) -> Iterator[Located]:
    check_file(path)
    suffix = path.suffix.lower()
    if suffix in BINARY_READERS:
        return BINARY_READERS[suffix](path)
    if suffix in TEXT_READERS:
        return TEXT_READERS[suffix](_decoded(path), path.name)
    raise DataError(
        f"{path.name}: expected one of the suffixes {', '.join(SUFFIXES)}, "
        f"got {path.suffix or 'none'!r}{nearest(suffix, SUFFIXES)}"
    )


def check_file(path: Path) -> None:
    """Raise DataError if there is no file at ``path``, or an empty one."""
    if path.is_dir():
        raise DataError(f"{path}: expected a data file, got a directory; name a file in it")
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such data file{nearest(path.name, siblings)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; expected at least one record")


def _decoded(path: Path) -> str:
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise not_utf8(error, f"{path.name}, line {line}") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty; expected at least one record")
    return text


def _memory_records(records: Iterable[Mapping[str, Any]]) -> Iterator[Located]:
    if isinstance(records, Mapping):
        # A DatasetDict is a mapping of splits and would otherwise look like one record.
        splits = getattr(records, "column_names", None)
        advice = f"pass one split of {', '.join(records)}" if splits else "put it into a list"
        raise DataError(f"expected a list of records, got one {type(records).__name__}; {advice}")
    if not isinstance(records, Iterable):
        raise DataError(
            f"expected a path, a list of records or a Dataset, got {type(records).__name__}; pass one of these"
        )
    for number, record in enumerate(records, start=1):
        yield as_record(record, f"record {number}")


Task: TypeAlias = Literal["classification", "generation"]

MOST_LABELS = 100
LONGEST_LABEL = 64  # characters
FEWEST_RECORDS_PER_LABEL = 2.0


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
