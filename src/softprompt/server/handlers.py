"""Errors that are raised below a route, and by FastAPI itself, answered in the one shape."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from softprompt.errors import SoftPromptError, excerpt
from softprompt.server.problems import Problem, problem_of
from softprompt.server.refusals import refusal


def install(app: FastAPI) -> None:
    """Have every error of an app answered in this shape."""

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return refusal(error.errors(), error.body, _fields_of(request)).response()

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
        # FastAPI's own, for JSON that Python does not take, such as numbers of 5,000 digits.
        400: "the body cannot be read as JSON; send an object of usual values",
        404: f"there is no {path}; see /openapi.json",
        405: f"{path} does not take {request.method}",
    }
    message = texts.get(error.status_code, str(error.detail))
    return Problem(error.status_code, message, headers=error.headers)


def _fields_of(request: Request) -> list[str]:
    """Return the fields that a request's body may have."""
    field = getattr(request.scope.get("route"), "body_field", None)
    model = field.field_info.annotation if field is not None else None
    return list(getattr(model, "model_fields", ()))
