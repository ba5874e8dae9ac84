"""The access log: a line for each request, with its prompt and its tokens, and never what was asked."""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class RequestTally:
    """What one request was about: its prompt, and how many tokens it read and wrote."""

    prompt: str = ""
    input: int = 0
    virtual: int = 0
    output: int = 0

    def __str__(self) -> str:
        if not self.prompt:
            return ""
        return f" prompt={self.prompt} input={self.input} virtual={self.virtual} output={self.output}"


_current: ContextVar[RequestTally | None] = ContextVar("tally of the request", default=None)


def tally(*, prompt: str = "", tokens: int = 0, virtual: int = 0, output: int = 0) -> None:
    """Add to the line of the request that is being answered, where there is an access log."""
    found = _current.get()
    if found is not None:
        found.prompt = prompt or found.prompt
        found.input += tokens
        found.virtual += virtual
        found.output += output


@final
class AccessLog:
    """ASGI middleware that logs every request once it is answered; to be outermost."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        # Who asks for an access log gets it with --quiet too.
        logger.setLevel(logging.INFO)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application on a request, and log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        found, status, began = RequestTally(), 0, time.monotonic()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        token = _current.set(found)
        try:
            await self._app(scope, receive, noted)
        finally:
            _current.reset(token)
            # As it was sent: percent-encoded, so that no path writes a line of its own. The query is content.
            path = scope.get("raw_path", b"").partition(b"?")[0].decode("ascii", "backslashreplace")
            seconds = time.monotonic() - began
            logger.info("%s %s %d %.3fs%s", scope["method"], path[:200], status, seconds, found)
