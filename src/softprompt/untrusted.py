"""Files that others wrote, read within bounds: the one place that limits bytes, nesting, numbers, texts and types.

Every reader of a prompt, a record or a run file goes through here, so that none costs more than two seconds or
200 MB, taken or refused. ``SOFTPROMPT_MAX_PROMPT_BYTES`` raises the limit of weights, and
``SOFTPROMPT_MAX_UNPACKED_BYTES`` that of what data unpacks to.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import re
import stat
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from softprompt.errors import ArtifactError, DataError, SoftPromptError, broken, excerpt

MOST_TEXT_BYTES = 2 << 20
"""Bytes of a file of plain values, such as JSON."""
MOST_HEADER_BYTES = 1 << 20
"""Bytes of what describes the tensors of a file of weights."""
MOST_DEPTH, MOST_VALUES, MOST_CHARACTERS, MOST_INTEGER = 32, 100_000, 1 << 20, 1 << 63
MOST_TEMPLATE, MOST_LABELS, MOST_LABEL = 1 << 17, 4_096, 1_000
"""Characters of a template; labels, and characters of one."""
MOST_VIRTUAL_TOKENS, MOST_SIZE = 1 << 16, 1 << 20
"""Virtual tokens of a prompt, and any other size that its configuration names."""
_MOST_OF_A_NAME = 255
"""Characters of a part of a path; more are no name to any file system."""
_VARIABLE, _UNPACKED = "SOFTPROMPT_MAX_PROMPT_BYTES", "SOFTPROMPT_MAX_UNPACKED_BYTES"


def most_weight_bytes() -> int:
    """Return how many bytes the weights of a prompt may have: 64 MiB, or what the environment says."""
    given = os.environ.get(_VARIABLE, "")
    return int(given) if given.isdecimal() else 64 << 20


def say_if_large(size: int) -> None:
    """Warn of written weights that have more bytes than are read back unasked."""
    if size > most_weight_bytes():
        how = f"set {_VARIABLE}={size} where they are loaded, for a server --max-prompt-bytes {size}"
        logging.getLogger(__name__).warning(
            "the weights have %s bytes, more than are read unasked: %s", f"{size:,}", how
        )


def check_unpacked(size: int, packed: int, name: str) -> None:
    """Check what a file of data unpacks to: 64 MiB, 200 times its own bytes, or what the environment says.

    Raises:
        DataError: it is more.
    """
    given = os.environ.get(_UNPACKED, "")
    most = int(given) if given.isdecimal() else max(64 << 20, 200 * packed)
    if size > most:
        raise DataError(
            f"{name}: its {packed:,} bytes unpack to more than {most:,}: check that it is what it should be; "
            f"if you trust it, set {_UNPACKED} to the bytes that it may have"
        )


def read_bytes(
    path: Path, most: int | None = None, error: type[SoftPromptError] = ArtifactError, *, head: bool = False
) -> bytes:
    """Return the content of a file of at most so many bytes, or its ``head``; None is the limit of weights.

    Raises:
        SoftPromptError: it cannot be read, is larger, or is no file but a device or a pipe.
    """
    limit = most_weight_bytes() if most is None else most
    try:
        # NONBLOCK never waits on a pipe.
        with open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
        ) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise error(f"expected a file, {path} is a device or a pipe: copy what it gives into a file")
            data = file.read(limit + (not head)) if head or found.st_size <= limit else None
    except FileNotFoundError as cause:
        raise error(f"there is no file {path}: check the path") from cause
    except OSError as cause:
        raise error(f"could not read {path} ({cause}): check its permissions and the disk") from cause
    if data is None or len(data) > limit:
        raised = f"; if you trust it, set {_VARIABLE}={found.st_size}" if most is None else ""
        raise error(f"{path} is larger than {limit:,} bytes: check that it is what it should be{raised}")
    return data


def read_text(path: Path, most: int, error: type[SoftPromptError]) -> str:
    """Return the text of a file in UTF-8, all line breaks alike; raises as ``read_bytes``, or for other bytes."""
    try:
        text = read_bytes(path, most, error).decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not UTF-8 ({cause.reason}); convert it first") from cause
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_object(text: str, name: str) -> dict[str, Any]:
    """Read one JSON object from the text of the file ``name``.

    Raises:
        ArtifactError: not JSON, not an object, or beyond the bounds of ``check_plain``.
    """
    try:
        if len(text) > MOST_TEXT_BYTES:
            raise ValueError(f"{len(text):,} characters, more than {MOST_TEXT_BYTES:,}")
        with no_collection():
            value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"expected JSON in {name}, it cannot be read ({error}): restore it from the original"
        ) from error
    if not isinstance(value, dict):
        raise ArtifactError(
            f"expected a JSON object in {name}, got a {type(value).__name__}: restore it from the original"
        )
    check_plain(value, name)
    return value


@contextmanager
def no_collection() -> Iterator[None]:
    """Parse without collecting garbage: many lists would have each collection walk through all of torch."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def check_plain(values: Any, name: str, error: type[SoftPromptError] = ArtifactError) -> None:
    """Check plain values of the file ``name``: nesting, how many, lengths of texts, whole characters, numbers.

    Raises:
        SoftPromptError: they are beyond the bounds, or not plain.
    """
    left, seen, why = [(values, 0)], 0, ""
    while left and not why:
        value, depth = left.pop()
        seen += 1
        match value:
            case dict() | list():
                inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
                if depth == MOST_DEPTH or seen + len(left) + len(inside) > MOST_VALUES:
                    why = f"it is nested more than {MOST_DEPTH} deep or has more than {MOST_VALUES:,} values"
                else:
                    left += [(each, depth + 1) for each in inside]
            case str():
                why = broken(value) or ("a text has a zero character" if "\0" in value else "")
                if len(value) > MOST_CHARACTERS:
                    why = f"a text has {len(value):,} characters, more than {MOST_CHARACTERS:,}"
            case float() if not math.isfinite(value):
                why = f"it has the number {value}"
            case int() if abs(value) >= MOST_INTEGER:
                why = "it has a number of more than 64 bits"
            case None | float() | int():
                pass
            case _:
                why = f"{excerpt(repr(value))} is a {type(value).__name__}"
    if why:
        raise error(f"expected plain values within bounds in {name}, {why}: restore it from the original")


def check_base_name(base: Any, where: str, error: type[SoftPromptError] = ArtifactError) -> Any:
    """Return the base that a file names; raises ``error`` where no file system has a name that long."""
    if base and max(map(len, base.split("/"))) > _MOST_OF_A_NAME:
        raise error(f"expected the name of a base in {where}, got {base[:40]!r}...: restore it")
    return base


def check_types(owner: type, values: Mapping[str, Any], where: str, error: type[SoftPromptError]) -> None:
    """Check the values of a file against the types of a dataclass's fields; names that it lacks are passed over.

    Raises:
        SoftPromptError: One has another type.
    """
    hints = get_type_hints(owner)
    for name in [each.name for each in fields(owner) if each.name in values]:
        if not fits(values[name], hints[name]):
            wanted = type_name(hints[name])
            got = excerpt(repr(values[name]))
            raise error(f"expected {name} in {where} to be {wanted}, got {got}: restore it from the original")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a file has a type; an int is a float, and a list a tuple."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        return any(fits(value, option) for option in arguments)
    if hint is Any:
        return True
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(item, arguments[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(fits(item, arguments[1]) for item in value.values())
    kind = origin or hint
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def type_name(hint: Any) -> str:
    """Return what errors call a type."""
    return hint.__name__ if isinstance(hint, type) else re.sub(r"(\w+\.)+(?=[A-Z])", "", str(hint))
