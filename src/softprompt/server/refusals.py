"""What is wrong with a body, in one line: where, what was expected there, and what came."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from softprompt.errors import excerpt, nearest
from softprompt.server.problems import Problem

CHOICES: Mapping[str, str] = {
    "prompt": "a text, token ids from 0 up, or a list of texts or of token id lists; no empty list",
    "fields": "an object that gives each field of the template a text or number, or a list of such objects",
    "stop": "a text, or up to 16 texts, each of 1 to 200 characters",
    "input": "a text, or a list of texts",
    "task": "the name or number of a task",
    "content": 'a text, or a list of parts {"type": "text", "text": ...}',
    "role": 'one such as "user", of small letters and underscores',
}
"""What fields take that take several kinds of value; of a choice no one branch's complaint is the right one."""

_KINDS = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of at most 64 bits",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "a number of at least {:,g}"),
    "greater_than": ("gt", "a number above {:,g}"),
    "less_than_equal": ("le", "a number of at most {:,}"),
    "too_short": ("min_length", "a list of at least {:,}"),
    "too_long": ("max_length", "a list of at most {:,}"),
    "string_too_short": ("min_length", "a text of {:,} or more characters"),
    "string_too_long": ("max_length", "a text of at most {:,} characters"),
}
_NO_OBJECT = (
    "expected a JSON object in the body, and the header 'Content-Type: application/json'; got {}"
)


def refusal(errors: Sequence[Mapping[str, Any]], body: Any, known: Sequence[str]) -> Problem:
    """Return the answer to a body that is no request.

    Args:
        errors: What pydantic says, at least one.
        body: What came.
        known: The fields that such a body has.
    """
    first = errors[0]
    inner = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", "")
        return Problem(400, f"the body is not JSON ({excerpt(str(why))})")
    if first["type"] == "value_error":
        return Problem(400, f"the body cannot be read: {first['ctx']['error']}")
    if not inner:
        came = "nothing" if first["type"] == "missing" else _shown(body)
        return Problem(400, _NO_OBJECT.format(came))
    place = _place(inner)
    where, param = excerpt(_written(place)), excerpt(str(place[0]))
    if first["type"] == "extra_forbidden":
        hint = nearest(where, known) if len(place) == 1 else ""
        return Problem(400, f"{where} is not known here{hint}; leave it out", param=param)
    if first["type"] == "none_required" and place[-1] not in CHOICES:
        return Problem(400, f"{where} is not served; leave it out", param=param)
    if first["type"] == "missing":
        return Problem(400, f"{where} is missing; send {_expected(place, None)}", param=param)
    message = f"{where} takes {_expected(place, first)}; got {_shown(_at(body, place))}"
    return Problem(400, message, param=param)


def _place(inner: Sequence[str | int]) -> list[str | int]:
    """Return the way to the value that is wrong; below a choice pydantic names its branches."""
    for depth, part in enumerate(inner):
        if part in CHOICES:
            return list(inner[: depth + 1])
    return list(inner)


def _written(place: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)[1:]


def _expected(place: Sequence[str | int], error: Mapping[str, Any] | None) -> str:
    if place[-1] in CHOICES:
        return CHOICES[str(place[-1])]
    if error is None:
        return _MISSING.get(str(place[-1]), "a value")
    kind = error["type"]
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return words.format(error["ctx"][name])
    return _KINDS.get(kind, str(error["msg"]))


_MISSING = {
    "model": "the name of a prompt, or of the base; GET /v1/models lists them",
    "messages": 'a list such as [{"role": "user", "content": "..."}]',
}


def _at(body: Any, place: Sequence[str | int]) -> Any:
    for part in place:
        body = body[part]
    return body


def _shown(value: Any) -> str:
    """Return the beginning of what came, as JSON; of long lists how long they are."""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, list) and len(value) > 8:
        return f"a list of {len(value):,}"
    try:
        return excerpt(json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError):
        return f"a value of type {type(value).__name__}"
