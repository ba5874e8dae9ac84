"""Every error as OpenAI's clients expect it: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from fastapi.responses import JSONResponse
from pydantic import BaseModel

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
    503: ("server_error", "unavailable"),
}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class Problem(Exception):
    """An answer other than the one asked for; raised anywhere below a route."""

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
        # Lone surrogates, which JSON may bring in, have no UTF-8.
        text = message.encode("utf-8", "backslashreplace").decode()
        self.body = {
            "error": {"message": text, "type": kind, "param": param, "code": code or usual}
        }

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def problem_of(error: BaseException) -> Problem:
    """Return the answer that an error is; what we did not foresee is logged and not shown."""
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
        case ArtifactError():
            return Problem(500, str(error), code="prompt_unusable", param="model")
        case NotServingError():
            return Problem(503, str(error), headers={"Retry-After": "1"})
        case ConfigError() | DataError() | ServingError():
            return Problem(400, str(error))
        case SoftPromptError():
            return Problem(500, str(error))
    logger.error("request failed", exc_info=error)
    return Problem(500, "the server failed on this request; its log says why")
