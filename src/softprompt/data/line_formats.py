"""JSONL and JSON: text whose records keep their line numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from softprompt.data.located import Located, as_record
from softprompt.errors import DataError


def read_json_lines(text: str, name: str) -> Iterator[Located]:
    """Yield one record for each line that is not blank.

    Raises:
        DataError: A line is not one JSON object.
    """
    # JSON strings may hold U+2028 and the like bare, so only "\n" ends a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{name}, line {number}"
            yield as_record(_parse(line, where), where)


def read_json_list(text: str, name: str) -> Iterator[Located]:
    """Yield the objects of one JSON list, each placed at the line where it begins.

    Raises:
        DataError: The text is not a JSON list of objects.
    """
    position = _skip_space(text, 0)
    if text[position] != "[":
        raise _unexpected(
            text, position, name, "a JSON list of records; if each line is one, name it .jsonl"
        )
    decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: _no_repeats(pairs, name))
    line, counted = 1, 0
    position = _skip_space(text, position + 1)
    is_open = text[position : position + 1] != "]"
    while is_open:
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _malformed(error, f"{name}, line {_error_line(error, line)}") from error
        yield as_record(value, f"{name}, line {line}")
        position = _skip_space(text, position)
        is_open = text[position : position + 1] == ","
        if is_open:
            position = _skip_space(text, position + 1)
    if text[position : position + 1] != "]":
        raise _unexpected(text, position, name, "',' or ']' after a record")
    position = _skip_space(text, position + 1)
    if position < len(text):
        raise _unexpected(text, position, name, "the end of the file after the list")


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=lambda pairs: _no_repeats(pairs, where))
    except (json.JSONDecodeError, RecursionError) as error:
        raise _malformed(error, where) from error


def _no_repeats(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for key, value in pairs:
        if key in record:
            raise DataError(f"{where}: the field {key!r} occurs twice in one object; keep one")
        record[key] = value
    return record


def _malformed(error: json.JSONDecodeError | RecursionError, where: str) -> DataError:
    if isinstance(error, RecursionError):
        return DataError(f"{where}: expected a flat record, got JSON nested too deeply to read")
    return DataError(
        f"{where}: not valid JSON ({error.msg} at column {error.colno}); "
        'expected one object such as {"input": "...", "output": "..."}'
    )


def _error_line(error: json.JSONDecodeError | RecursionError, otherwise: int) -> int:
    return error.lineno if isinstance(error, json.JSONDecodeError) else otherwise


def _unexpected(text: str, position: int, name: str, expected: str) -> DataError:
    line = text.count("\n", 0, position) + 1
    found = repr(text[position : position + 20]) if position < len(text) else "the end of the file"
    return DataError(f"{name}, line {line}: expected {expected}, got {found}")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
