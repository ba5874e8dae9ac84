"""Reading bodies in a thread, one at a time, so that the event loop answers others meanwhile.

FastAPI parses and checks a body in the event loop. Here it gets one that is parsed and checked already.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, cast, final

import anyio
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

_READERS = 1
"""Bodies read at once: more would only take turns with each other, and with the event loop."""


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
        body, state = await self.body(), self.app.state
        if not hasattr(state, "readers"):
            state.readers = anyio.CapacityLimiter(_READERS)
        return await anyio.to_thread.run_sync(_checked, body, self.kind, limiter=state.readers)


def _checked(body: bytes, kind: type[BaseModel]) -> BaseModel:
    value = json.loads(body)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
        raise RequestValidationError(found, body=value) from None
