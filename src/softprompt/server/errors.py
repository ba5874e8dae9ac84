"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}``.

Every exception becomes such a body: those of softprompt by their class, those of pydantic's
validation in one line (where, what was expected, the value), anything else as a 500 that is logged.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from softprompt.errors import (
    AdapterError,
    ArtifactError,
    ConfigError,
    ContextOverflowError,
    DataError,
    NotServingError,
    QueueFullError,
    ServingError,
    SoftPromptError,
    UpstreamError,
    excerpt,
    line,
    nearest,
    without_folders,
)

logger = logging.getLogger(__name__)

INVALID, MISSING = "invalid_request_error", "not_found_error"
_CODES: Mapping[int, tuple[str, str | None]] = {
    400: (INVALID, None),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", None),
    404: (MISSING, None),
    405: (INVALID, "method_not_allowed"),
    408: (INVALID, "request_timeout"),
    413: (INVALID, "request_too_large"),
    421: (INVALID, "wrong_host"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", "internal_error"),
    502: ("server_error", "upstream_failed"),
    503: ("server_error", "unavailable"),
}


class ErrorDetail(BaseModel):
    """The error itself."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response with a status of 400 or more."""

    error: ErrorDetail


class Problem(Exception):
    """An HTTP error; raised anywhere below a route or in middleware.

    Args:
        status: HTTP status.
        message: One line for the client.
        code: Error code; None is the status' usual one.
        param: The field of the request that is at fault.
        headers: Further headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        kind, usual = _CODES.get(status, (INVALID if status < 500 else "server_error", None))
        self.status = status
        self.headers = dict(headers or {})
        self.body = {"error": {"message": line(message), "type": kind, "param": param, "code": code or usual}}

    def response(self) -> JSONResponse:
        """Return the response."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def problem_of(error: BaseException) -> Problem:
    """Return the HTTP error for an exception; an unexpected one is logged and its message not shown."""
    match error:
        case Problem():
            return error
        case QueueFullError():
            wait = str(max(1, math.ceil(error.retry_after)))
            return Problem(429, str(error), headers={"Retry-After": wait})
        case AdapterError():
            return Problem(404, str(error), code="model_not_found", param="model")
        case ContextOverflowError():
            return Problem(400, str(error), code="context_length_exceeded")
        case ConfigError() | DataError():
            return Problem(400, str(error))
        case SoftPromptError():
            return _of_server(error)
    logger.error("request failed", exc_info=error)
    return Problem(500, "the server failed on this request; its log says why")


def _of_server(error: SoftPromptError) -> Problem:
    """Return the HTTP error for what lies with the server, whose folders are nobody's business."""
    message = without_folders(str(error))
    match error:
        case ArtifactError():
            return Problem(500, message, code="prompt_unusable", param="model")
        case UpstreamError():
            return Problem(error.status, message, headers={"Retry-After": "1"})
        case NotServingError():
            return Problem(503, message, headers={"Retry-After": "1"})
        case ServingError():
            return Problem(400, message)
    return Problem(500, message)


def install_handlers(app: FastAPI) -> None:
    """Register exception handlers, so that every error of an app has this body."""

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        model = _body_of(request)
        known = [*getattr(model, "model_fields", ()), *getattr(model, "neutral", ())]
        return refusal(error.errors(), error.body, known, getattr(model, "expects", {})).response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _plain(request, error).response()

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return problem_of(error).response()

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Problem, ours)
    app.add_exception_handler(SoftPromptError, ours)
    app.add_exception_handler(Exception, ours)


def _plain(request: Request, error: HTTPException) -> Problem:
    path = excerpt(request.url.path)
    texts = {
        # FastAPI's own, for JSON that Python cannot parse, such as numbers of 5,000 digits.
        400: "the body cannot be read as JSON in UTF-8; send an object of usual values",
        404: f"there is no {path}; see /openapi.json",
        405: f"{path} does not take {request.method}",
    }
    message = texts.get(error.status_code, str(error.detail))
    return Problem(error.status_code, message, headers=error.headers)


def _body_of(request: Request) -> Any:
    """Return the class of a route's body; None where it has none."""
    field = getattr(request.scope.get("route"), "body_field", None)
    return field.field_info.annotation if field is not None else None


CHOICES: Mapping[str, str] = {
    "prompt": "a text, token ids from 0 up, or a list of up to 2,048 texts or token id lists, none empty",
    "fields": "an object that gives each field of the template a text or number, or a list of such objects",
    "stop": "a text, or up to 16 texts, each of 1 to 200 characters",
    "input": "a text, or a list of texts",
    "task": "the name or number of a task",
    "guided_json": "a JSON schema, as an object or its text",
    "json": "a JSON schema, as an object or its text",
    "content": 'a text, or a list of parts {"type": "text", "text": ...}',
    "role": 'one such as "user", of small letters and underscores',
}
"""What union fields accept: pydantic reports each branch of a union, and none of them says it all."""

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
_NO_OBJECT = "expected a JSON object in the body, and the header 'Content-Type: application/json'; got {}"


def refusal(
    errors: Sequence[Mapping[str, Any]], body: Any, known: Sequence[str], expects: Mapping[str, str]
) -> Problem:
    """Return the error for a body that fails validation.

    Args:
        errors: pydantic's errors, at least one; the first is reported.
        body: The body as received.
        known: The body's field names.
        expects: What some of them take in this body, instead of what ``CHOICES`` says.
    """
    first = errors[0]
    inner = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", "")
        return Problem(400, f"the body is not JSON ({excerpt(str(why))})")
    if first["type"] == "value_error":
        return Problem(400, f"the body cannot be read: {first['ctx']['error']}")
    if first["type"] == "not_served":
        inner = [*inner, first["ctx"]["name"]]
    if not inner:
        got = "nothing" if first["type"] == "missing" else _shown(body)
        return Problem(400, _NO_OBJECT.format(got))
    place = _place(inner)
    where, param = excerpt(_written(place)), excerpt(str(place[0]))
    if first["type"] == "extra_forbidden":
        hint = nearest(where, known) if len(place) == 1 else ""
        return Problem(400, f"{where} is not known here{hint}; leave it out", param=param)
    if first["type"] == "not_served":
        return Problem(400, f"{where} is not served; {first['ctx']['instead']}", param=param)
    if first["type"] == "missing":
        return Problem(400, f"{where} is missing; send {_expected(place, None, expects)}", param=param)
    message = f"{where} takes {_expected(place, first, expects)}; got {_shown(_at(body, place))}"
    return Problem(400, message, param=param)


def _place(inner: Sequence[str | int]) -> list[str | int]:
    """Return the path to the invalid value; inside a union pydantic appends the names of branches."""
    for depth, part in enumerate(inner):
        if part in CHOICES:
            return list(inner[: depth + 1])
    return list(inner)


def _written(place: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)[1:]


def _expected(place: Sequence[str | int], error: Mapping[str, Any] | None, expects: Mapping[str, str]) -> str:
    if place[-1] in CHOICES:
        return {**CHOICES, **expects}[str(place[-1])]
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
    """Return the beginning of a value as JSON; of a long list only its length."""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, list) and len(value) > 8:
        return f"a list of {len(value):,}"
    try:
        return excerpt(json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError):
        return f"a value of type {type(value).__name__}"
