"""Checks of single configuration fields; each returns the value in its proper type."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

from softprompt.errors import ConfigError, nearest

_Member = TypeVar("_Member", bound=StrEnum)


def member(kind: type[_Member], name: str, value: object) -> _Member:
    """Return the member of an enumeration that a value names.

    Raises:
        ConfigError: If there is none.
    """
    if value not in list(kind):
        raise ConfigError(
            f"{name} must be one of {', '.join(kind)}, got {value!r}{nearest(str(value), kind)}"
        )
    return kind(str(value))


def positive(name: str, value: object, *, least: int = 1) -> int:
    """Return a value that is a whole number of at least ``least``.

    Raises:
        ConfigError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ConfigError(f"{name} must be {wanted}, got {value!r}")
    return value


def number(name: str, value: object) -> float:
    """Return a value that is a number of at least 0.

    Raises:
        ConfigError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e38:
        raise ConfigError(f"{name} must be a number of at least 0, got {value!r}")
    return value
