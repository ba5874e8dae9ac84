"""Settings as dataclass fields: type, default, range and help text, each declared once.

One declaration serves Python's keyword arguments, the keys of a TOML run file, the options of the
command line and their help, so they can never differ. No torch here: `softprompt --help` reads it.
"""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Mapping
from copy import copy
from dataclasses import MISSING, Field, field, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from softprompt.errors import ConfigError, nearest

Settings = TypeVar("Settings")
_Member = TypeVar("_Member", bound=StrEnum)


def setting(
    default: Any,
    help_text: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    group: str | None = None,
    ours: bool | None = None,
    word: str | None = None,
    formerly: tuple[str, str] | None = None,
) -> Any:
    """Declare a field of a dataclass with its default, help text and range.

    Args:
        default: Value where none is given; ``dataclasses.MISSING`` for a field that is required.
        help_text: Help text of the option.
        least: Smallest legal value.
        above: Lower limit, not itself legal.
        most: Largest legal value.
        group: Heading of the command's help that the option stands under.
        ours: Whether a configuration's field is one that PEFT's file has no key for.
        word: A text that a number may be instead.
        formerly: An earlier name that is taken still, with a warning, and the version that takes it no more.
    """
    known: dict[str, Any] = {"help": help_text, "least": least, "above": above, "most": most, "group": group}
    known |= {"ours": ours, "word": word, "formerly": formerly}
    return field(default=default, metadata={k: v for k, v in known.items() if v is not None})


def same_as(owner: type, name: str) -> Any:
    """Declare a field as another dataclass has it; only its annotation is written again."""
    return copy(owner.__dataclass_fields__[name])  # type: ignore[attr-defined]


@cache
def type_of(owner: type, name: str) -> Any:
    """Return the resolved annotation of a field without ``| None``."""
    hint = get_type_hints(owner)[name]
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def choices_of(owner: type, name: str) -> tuple[str, ...] | None:
    """Return the values a field is limited to, or None when it is not."""
    kind = type_of(owner, name)
    return get_args(kind) if get_origin(kind) is Literal else None


def from_mapping(owner: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Build a settings dataclass from names and values.

    Raises:
        ConfigError: A name is unknown; the nearest known one is named. Or a field has its value under two names.
    """
    values = renamed(owner, values)
    known = [item.name for item in fields(owner)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return owner(**values)


def renamed(owner: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by names, those under earlier names of a dataclass's fields under the present ones.

    Raises:
        ConfigError: A field has its value under both names.
    """
    found = dict(values)
    for item in fields(owner):
        was, end = item.metadata.get("formerly", (None, ""))
        if was in found:
            if item.name in found:
                raise ConfigError(f"{was} is the earlier name of {item.name}, and both are given; leave {was} out")
            say_renamed(was, item.name, end)
            found[item.name] = found.pop(was)
    return found


@cache
def say_renamed(was: str, name: str, end: str) -> None:
    """Warn, once a process, of a public name that is another one now, until the version that ends it."""
    warnings.warn(f"{was} is {name} now; version {end} takes the earlier name no more", FutureWarning, stacklevel=3)


def check(settings: Any) -> None:
    """Check type and range of every field of a settings dataclass.

    Raises:
        ConfigError: A value of the wrong type or out of range; names the field, what it takes and the value.
    """
    for item in fields(settings):
        value = getattr(settings, item.name)
        if (value is None and item.default is None) or value == item.metadata.get("word", item):
            continue
        _check_value(type(settings), item, value)


def plain(settings: Any) -> dict[str, Any]:
    """Return the fields that are not None as plain values, nested settings as dicts."""
    values = {item.name: getattr(settings, item.name) for item in fields(settings)}
    return {
        name: plain(value)
        if is_dataclass(value)
        else dict(value)
        if isinstance(value, dict)
        else list(value)
        if isinstance(value, tuple)
        else value
        for name, value in values.items()
        if value is not None
    }


def flat(values: Mapping[str, Any], between: str, before: str = "") -> dict[str, Any]:
    """Return nested mappings as one level, the names on the way to a value joined by ``between``."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, between, f"{before}{name}{between}") if inner else {f"{before}{name}": value}
    return found


def default_of(item: Field[Any]) -> Any:
    """Return a field's default, also where a factory makes it."""
    if item.default_factory is not MISSING:
        return item.default_factory()
    return item.default


def _check_value(owner: type, item: Field[Any], value: Any) -> None:
    kind = type_of(owner, item.name)
    choices = choices_of(owner, item.name)
    if choices is not None:
        if value not in choices:
            hint = nearest(str(value).upper(), choices) or nearest(str(value).lower(), choices)
            raise ConfigError(f"{item.name} is one of {', '.join(choices)}; got {value!r}{hint}")
    elif kind in (int, float):
        ranges = {key: item.metadata.get(key) for key in ("least", "above", "most")}
        check_number(item.name, kind, value, **ranges)
    elif not isinstance(value, get_origin(kind) or kind):
        raise ConfigError(f"{item.name} takes {_article(get_origin(kind) or kind)}; got {value!r}")


def check_number(
    name: str,
    kind: type,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> None:
    """Check one number; a bool is none, and an int is a float.

    Raises:
        ConfigError: It is of another type, not finite, or out of range.
    """
    kinds = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ConfigError(f"{name} takes {_article(kind)}; got {value!r}")
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be finite; got {value!r}")
    if least is not None and value < least:
        raise ConfigError(f"{name} must be at least {least}; got {value!r}")
    if above is not None and value <= above:
        raise ConfigError(f"{name} must be above {above}; got {value!r}")
    if most is not None and value > most:
        raise ConfigError(f"{name} must be at most {most}; got {value!r}")


def member(kind: type[_Member], name: str, value: object) -> _Member:
    """Return the member of an enumeration that a field's value names.

    Raises:
        ConfigError: If there is none.
    """
    if value not in list(kind):
        raise ConfigError(f"{name} must be one of {', '.join(kind)}, got {value!r}{nearest(str(value), kind)}")
    return kind(str(value))


def _article(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(
        kind, f"a {kind.__name__}"
    )
