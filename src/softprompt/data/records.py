"""Records of every source in one form: text fields and a target text."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.data.columns import INPUT, Columns, choose_columns
from softprompt.data.located import Located
from softprompt.data.sources import Rows, read_records
from softprompt.errors import DataError, nearest

__all__ = ["Example", "Rows", "data_fingerprint", "read_examples"]


@dataclass(frozen=True, slots=True)
class Example:
    """One record, its values as text.

    Attributes:
        fields: Every column but the target, and ``input`` whatever the input column is called.
        target: The wanted answer; None where the data has none.
    """

    fields: Mapping[str, str]
    target: str | None


def read_examples(
    source: Rows,
    *,
    input_field: str | None = None,
    output_field: str | None = None,
    require_target: bool = True,
) -> list[Example]:
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
    examples: list[Example] = []
    columns: Columns | None = None
    for located in read_records(source):
        if columns is None:
            columns = choose_columns(
                located, input_field, output_field, require_target=require_target
            )
        examples.append(_example(located, columns, require_target=require_target))
    return examples


def data_fingerprint(source: Rows) -> dict[str, str | int]:
    """Return what identifies the data: ``path`` (a name, no folders), ``sha256`` and ``rows``.

    Raises:
        DataError: The source cannot be read, or can be read only once.
    """
    if isinstance(source, Iterator):
        raise DataError("expected rows that can be read twice, got an iterator; pass a list")
    records = [dict(located.record) for located in read_records(source)]
    if isinstance(source, str | Path):
        name, content = Path(source).name, Path(source).read_bytes()
    else:
        name = "rows in memory"
        content = json.dumps(records, sort_keys=True, default=str).encode()
    return {"path": name, "sha256": hashlib.sha256(content).hexdigest(), "rows": len(records)}


def _example(located: Located, columns: Columns, *, require_target: bool) -> Example:
    record = located.record
    fields = {
        name: text
        for name, value in record.items()
        if name != columns.target and (text := _text(value, name, located.where)) is not None
    }
    if columns.input not in fields:
        raise DataError(f"{located.where}: {_lack(columns.input, record)}")
    fields[INPUT] = fields[columns.input]
    return Example(fields, _target(located, columns, require_target=require_target))


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
        return scalar
    if scalar is None or (isinstance(scalar, float) and math.isnan(scalar)):
        return None
    if isinstance(scalar, bool | int | float):
        return json.dumps(scalar)
    raise DataError(
        f"{where}: expected text or a number in the field {name!r}, "
        f"got a value of type {type(scalar).__name__}"
    )
