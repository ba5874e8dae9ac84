"""Reading bodies in a thread, one at a time, so that the event loop answers others meanwhile; so long ones' texts.

FastAPI parses and checks a body in the event loop. Here it gets one that is parsed and checked already.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, cast, final

import anyio
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from softprompt.server.service import in_thread

P = ParamSpec("P")
Result = TypeVar("Result")
_LONG = 20_000
"""Bytes of a body from which on its texts are tokenised in turn: some 20 ms of a tokenizer."""


@final
class BodyRoute(APIRoute):
    """A route with a body, which is read in a thread."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, for requests that read their bodies so."""
        handler = super().get_route_handler()
        assert self.body_field is not None
        kind = cast(type[BaseModel], self.body_field.field_info.annotation)

        async def handle(request: Request) -> Response:
            try:
                return await handler(_Read.of(request, kind))
            except HTTPException as error:  # which FastAPI makes of every error while it reads
                if isinstance(error.__cause__, RequestValidationError):
                    raise error.__cause__ from None
                raise

        return handle


class _Read(Request):
    """A request whose ``json`` is the model of its body, checked."""

    kind: type[BaseModel]

    @classmethod
    def of(cls, request: Request, kind: type[BaseModel]) -> Request:
        """Return a request with the class of its body."""
        own = cls(request.scope, request.receive)
        own.kind = kind
        return own

    async def json(self) -> Any:
        """Return the checked body.

        Raises:
            RequestValidationError: It is not valid.
        """
        return await anyio.to_thread.run_sync(
            _checked, await self.body(), self.kind, limiter=_one_at_a_time(self, "read")
        )


async def in_turn(request: Request, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """Tokenise what a body holds, in a thread; of long bodies one at a time.

    A tokenizer works for one caller at a time. Many long texts would have short ones wait for all of them, and take
    all threads.
    """
    if len(await request.body()) <= _LONG:
        return await in_thread(function, *args, **kwargs)
    async with _one_at_a_time(request, "tokenised"):
        return await in_thread(function, *args, **kwargs)


def _one_at_a_time(request: Request, what: str) -> anyio.CapacityLimiter:
    """Return the application's limiter of bodies that are read, or tokenised.

    More at once would only take turns with each other, and with the event loop.
    """
    state = request.app.state
    if not hasattr(state, what):
        setattr(state, what, anyio.CapacityLimiter(1))
    return cast(anyio.CapacityLimiter, getattr(state, what))


def _checked(body: bytes, kind: type[BaseModel]) -> BaseModel:
    value = json.loads(body)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
        raise RequestValidationError(found, body=value) from None
