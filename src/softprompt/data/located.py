"""One record and the place it came from, so that every complaint about it can name that place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softprompt.errors import DataError


@dataclass(frozen=True, slots=True)
class Located:
    """A record as its format gave it, before its columns are given a meaning.

    Attributes:
        where: The place in words, such as ``train.csv, line 12`` or ``row 3``.
        record: Column name to value.
    """

    where: str
    record: Mapping[str, Any]


def as_record(value: object, where: str) -> Located:
    """Check that ``value`` maps column names to values.

    Raises:
        DataError: It is something else, or a column name is not text.
    """
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where}: expected a record such as {{'input': ..., 'output': ...}}, "
            f"got {_kind(value)}"
        )
    for name in value:
        if not isinstance(name, str):
            raise DataError(f"{where}: expected column names as text, got {name!r}")
    return Located(where, value)


def _kind(value: object) -> str:
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    return f"a value of type {type(value).__name__}"
