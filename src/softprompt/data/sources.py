"""Where records come from: a file of any format, memory, or a ``datasets.Dataset``; each with where it was read."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from softprompt.data.file_formats import BINARY_READERS, SUFFIXES, TEXT_READERS, Located, as_record, not_utf8
from softprompt.errors import DataError, nearest

DataSource: TypeAlias = str | Path | Iterable[Mapping[str, Any]]


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
