"""Bounds around every request: connections beside it, its size, its time, an answer nobody reads."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softprompt.server.problems import Problem
from softprompt.server.service import Service
from softprompt.server.settings import ServeSettings

logger = logging.getLogger(__name__)

_PROBES = frozenset({"/health", "/ready", "/metrics"})
"""What those who run the server ask; answered when it is full, too."""
_RETRY_SECONDS = 1


@final
class Limits:
    """An ASGI layer; outside the app, so that no body is read before it is bounded."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with what is wrong."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self._service.meter.refused.labels(str(message["status"])).inc()
            await send(message)

        bounded = _Bounded(receive, counted, self._service.settings)
        try:
            self._check(Headers(scope=scope), scope["path"])
            await self._app(scope, bounded.receive, bounded.send)
        except Exception as error:
            if bounded.unread:
                logger.warning("hung up on a client that stopped reading its answer")
                return
            # An app may take any error in a body for bad JSON, so the reason is kept here.
            problem = error if isinstance(error, Problem) else bounded.problem
            if problem is None or bounded.answering:
                raise
            response = problem.response()
            response.headers["connection"] = "close"
            await response(scope, receive, counted)

    def _check(self, headers: Headers, path: str) -> None:
        service, settings = self._service, self._service.settings
        service.access.check_host(headers.get("host", ""))
        # The connection that asks is one of those that are open.
        count = 0 if service.connections is None else service.connections.count
        if count > settings.max_connections and path not in _PROBES:
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
    """The two ends of one request."""

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
        """Return the next piece of the request.

        Raises:
            Problem: 413 or 408.
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
        """Send the next piece of the answer; a client that stops reading is hung up on.

        Raises:
            TimeoutError: Nobody read for too long.
            Problem: The request was given up, and the app answers something else.
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
        """Remember why."""
        self.problem = problem
        return problem


def _too_large(most: int) -> Problem:
    return Problem(413, f"the request is larger than {most:,} bytes; send less at a time")
