"""ASGI middleware: connection, body-size and slow-reader limits.

It wraps the whole application, so no body is read before its size and time are bounded. uvicorn
itself waits without limit for the head of a request, so idle connections are closed here, too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary

import uvicorn
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softprompt.server.access import Access
from softprompt.server.errors import Problem
from softprompt.server.metrics import Metrics
from softprompt.server.settings import ServeSettings

logger = logging.getLogger(__name__)

_PROBES = frozenset({"/health", "/ready", "/metrics"})
"""Probes of operators; answered over the connection limit, too."""
_RETRY_SECONDS = 1


@final
class Limits:
    """ASGI middleware: connection, body-size and slow-reader limits, and the check of the host."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServeSettings,
        access: Access,
        metrics: Metrics,
        connections: Connections,
    ) -> None:
        self._app = app
        self._settings = settings
        self._access = access
        self._metrics = metrics
        self._connections = connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application on a request, or answer with the error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self._metrics.refused.labels(str(message["status"])).inc()
            await send(message)

        bounded = _Bounded(receive, counted, self._settings)
        try:
            self._check(Headers(scope=scope), scope["path"])
            await self._app(scope, bounded.receive, bounded.send)
        except Exception as error:
            if bounded.unread:
                logger.warning("closed the connection of a client that stopped reading its answer")
                return
            # FastAPI takes any exception while it reads a body for invalid JSON: the cause is kept here.
            problem = error if isinstance(error, Problem) else bounded.problem
            if problem is None or bounded.answering:
                raise
            response = problem.response()
            response.headers["connection"] = "close"
            await response(scope, receive, counted)

    def _check(self, headers: Headers, path: str) -> None:
        settings = self._settings
        self._access.check_host(headers.get("host", ""))
        # The request's own connection is counted, too.
        if self._connections.count > settings.max_connections and path not in _PROBES:
            raise Problem(
                503,
                f"this server has its {settings.max_connections:,} connections open; try again in "
                f"{_RETRY_SECONDS} s, or raise --max-connections",
                headers={"Retry-After": str(_RETRY_SECONDS)},
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > settings.max_body_bytes:
            raise _too_large(settings.max_body_bytes)


class _Bounded:
    """Bounded ``receive`` and ``send`` of one request."""

    def __init__(self, receive: Receive, send: Send, settings: ServeSettings) -> None:
        self._receive = receive
        self._send = send
        self._settings = settings
        self._deadline = time.monotonic() + settings.body_seconds
        self._bytes = 0
        self._whole = False
        self.problem: Problem | None = None
        self.answering = False
        self.unread = False

    async def receive(self) -> Message:
        """Return the next message of the request.

        Raises:
            Problem: 413, the body is too large; 408, it took too long.
        """
        if self._whole:
            return await self._receive()
        left = max(0.0, self._deadline - time.monotonic())
        try:
            message = await asyncio.wait_for(self._receive(), left)
        except TimeoutError:
            raise self._given_up(
                Problem(408, "the request took too long to arrive; send it again")
            ) from None
        self._bytes += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._bytes > self._settings.max_body_bytes:
            raise self._given_up(_too_large(self._settings.max_body_bytes))
        return message

    async def send(self, message: Message) -> None:
        """Send the next message of the response; a client that stops reading is disconnected.

        Raises:
            TimeoutError: The client has not read for ``stall_seconds``.
            Problem: The request broke a limit, and the application tries to answer otherwise.
        """
        if self.problem is not None and not self.answering:
            raise self.problem
        self.answering = True
        try:
            await asyncio.wait_for(self._send(message), self._settings.stall_seconds)
        except TimeoutError:
            self.unread = True
            raise

    def _given_up(self, problem: Problem) -> Problem:
        """Remember the error."""
        self.problem = problem
        return problem


def _too_large(most: int) -> Problem:
    return Problem(413, f"the request is larger than {most:,} bytes; send less at a time")


@dataclass(frozen=True, slots=True)
class _Silence:
    """Since when a connection has been idle.

    Attributes:
        behind: Its last request, None before the first.
        since: When it was first seen idle, by ``time.monotonic``.
    """

    behind: Any
    since: float


@final
class Connections:
    """The open connections of a uvicorn server; none under another ASGI server."""

    def __init__(self, server: uvicorn.Server | None = None) -> None:
        self._open: set[Any] = set()
        self._silent: WeakKeyDictionary[Any, _Silence] = WeakKeyDictionary()
        if server is not None:
            self.attach(server)

    def attach(self, server: uvicorn.Server) -> None:
        """Take the connections from a server."""
        self._open = server.server_state.connections

    @property
    def count(self) -> int:
        """Number of open connections, idle ones included."""
        return len(self._open)

    def close_silent(self, seconds: float) -> None:
        """Close connections idle for longer than that; to be called in uvicorn's own thread."""
        now = time.monotonic()
        for each in list(self._open):
            cycle = each.cycle
            if cycle is not None and not cycle.response_complete:
                self._silent.pop(each, None)
                continue
            known = self._silent.get(each)
            if known is None or known.behind is not cycle:
                self._silent[each] = _Silence(cycle, now)
            elif now - known.since > seconds:
                each.transport.close()
