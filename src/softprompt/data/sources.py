"""Where records come from: a file by its suffix, rows in memory, or a ``datasets.Dataset``.

Adding a file format is one line in ``_TEXT_READERS`` or ``_BINARY_READERS``.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from softprompt.data.column_formats import read_arrow, read_parquet
from softprompt.data.line_formats import read_json_lines, read_json_list
from softprompt.data.located import Located, as_record
from softprompt.data.table_formats import read_csv, read_tsv
from softprompt.errors import DataError, nearest

Rows: TypeAlias = str | Path | Iterable[Mapping[str, Any]]

_TEXT_READERS: Mapping[str, Callable[[str, str], Iterator[Located]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json_list,
    ".csv": read_csv,
    ".tsv": read_tsv,
}
_BINARY_READERS: Mapping[str, Callable[[Path], Iterator[Located]]] = {
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
SUFFIXES = (*_TEXT_READERS, *_BINARY_READERS)


def read_records(source: Rows) -> Iterator[Located]:
    """Yield the records of ``source`` with their places; at least one.

    Args:
        source: A path (its suffix names the format), an iterable of mappings, or a
            ``datasets.Dataset``.

    Raises:
        DataError: The source is missing, empty, of an unknown format, or damaged.
    """
    if isinstance(source, str | Path):
        yield from _or_none_left(_file_records(Path(source)), f"{Path(source).name}")
    else:
        yield from _or_none_left(_memory_records(source), "the data")


def _or_none_left(records: Iterator[Located], name: str) -> Iterator[Located]:
    found = False
    for record in records:
        found = True
        yield record
    if not found:
        raise DataError(f"{name}: expected at least one row, got none")


def _file_records(path: Path) -> Iterator[Located]:
    check_file(path)
    suffix = path.suffix.lower()
    if suffix in _BINARY_READERS:
        return _BINARY_READERS[suffix](path)
    if suffix in _TEXT_READERS:
        return _TEXT_READERS[suffix](_text(path), path.name)
    raise DataError(
        f"{path.name}: expected one of the suffixes {', '.join(SUFFIXES)}, "
        f"got {path.suffix or 'none'!r}{nearest(suffix, SUFFIXES)}"
    )


def check_file(path: Path) -> None:
    """Check that ``path`` is a file with something in it.

    Raises:
        DataError: It does not exist, is a directory, or is empty.
    """
    if path.is_dir():
        raise DataError(f"{path}: expected a data file, got a directory; name a file in it")
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such data file{nearest(path.name, siblings)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; expected at least one row")


def _text(path: Path) -> str:
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path.name}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); "
            "convert the file to UTF-8"
        ) from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty; expected at least one row")
    return text


def _memory_records(rows: Iterable[Mapping[str, Any]]) -> Iterator[Located]:
    if isinstance(rows, Mapping):
        # A DatasetDict is a mapping of splits and would otherwise look like one record.
        splits = getattr(rows, "column_names", None)
        advice = f"pass one split of {', '.join(rows)}" if splits else "put it into a list"
        raise DataError(f"expected rows, got one {type(rows).__name__}; {advice}")
    if not isinstance(rows, Iterable):
        raise DataError(
            f"expected a path, a list of records or a Dataset, got {type(rows).__name__}"
        )
    for number, row in enumerate(rows, start=1):
        yield as_record(row, f"row {number}")
