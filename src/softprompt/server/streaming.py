"""Server-sent events, and answers that stop when nobody listens any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar, final

from fastapi import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from softprompt.server.problems import problem_of
from softprompt.server.run import Run, until_gone

Result = TypeVar("Result")
_DONE = b"data: [DONE]\n\n"
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": _EVENT}}}
}
"""For the description of routes that may stream."""
CLIENT_GONE = 499
"""What a log shows for an answer that nobody waited for."""


@final
class EventStream(Response):
    """Pieces of an answer as server-sent events, closed with ``[DONE]`` as OpenAI's are."""

    media_type = "text/event-stream"

    def __init__(self, run: Run, pieces: AsyncGenerator[Mapping[str, Any]]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._run = run
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces; whatever happens, nothing runs on afterwards."""
        headers = {name: value for name, value in self.headers.items() if name != "content-length"}
        inner = StreamingResponse(_lines(self._pieces), headers=headers)
        try:
            async with aclosing(self._pieces):
                await inner(scope, receive, send)
        finally:
            self._run.cancel()


async def _lines(pieces: AsyncGenerator[Mapping[str, Any]]) -> AsyncGenerator[bytes]:
    try:
        async for piece in pieces:
            yield _line(piece)
    except (
        Exception
    ) as error:  # the status is sent already; the client finds the error in the stream
        yield _line(problem_of(error).body)
    yield _DONE


def _line(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


async def unless_gone(
    request: Request, answer: Awaitable[Result], cancel: Callable[[], object]
) -> Result | None:
    """Wait for an answer; None when the client hung up, and the answer is cancelled."""
    working = asyncio.ensure_future(answer)
    gone = asyncio.create_task(until_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        gone.cancel()
        if not working.done():
            working.cancel()
            cancel()
            await asyncio.wait({working})
            # An error that comes of the cancelling is nobody's.
            _ = working.cancelled() or working.exception()
