"""Middleware and access control: API keys, allowed hosts, and limits of connections, bodies and slow readers.

Keys are compared in constant time; a check of the Host header prevents DNS rebinding. ``Limits`` wraps
the whole application, so no body is read before its size and time are bounded. uvicorn itself waits
without limit for the head of a request, so idle connections are closed here, too.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import uvicorn
from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softprompt.errors import UsageError, excerpt
from softprompt.server.errors import Problem

if TYPE_CHECKING:
    from softprompt.server.metrics import Metrics
    from softprompt.server.settings import ServeSettings

logger = logging.getLogger(__name__)

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_PROBES = frozenset({"/health", "/ready", "/metrics"})
"""Probes of operators; answered over the connection limit, too."""
_RETRY_SECONDS = 1


@dataclass(frozen=True, slots=True, repr=False)
class Keys:
    """SHA-256 digests of API keys; whether none admits everybody or nobody is for the caller."""

    digests: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, keys: Sequence[str]) -> Self:
        """Return the digests of keys."""
        return cls(tuple(_digest(key) for key in keys))

    @classmethod
    def read(cls, path: str | None) -> Self:
        """Read a key file, one key a line; None is no keys.

        Raises:
            UsageError: The file cannot be read, or is empty.
        """
        if path is None:
            return cls()
        return cls.of(keys_in(path))

    def accept(self, key: str) -> bool:
        """Whether a key is among these; takes the same time for every key."""
        given = _digest(key)
        found = False
        for digest in self.digests:
            found |= hmac.compare_digest(given, digest)
        return found

    def __bool__(self) -> bool:
        return bool(self.digests)


def keys_in(path: str) -> list[str]:
    """Return the keys in a file, one a line; raises UsageError if it cannot be read, or is empty."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"the file of keys {path} cannot be read ({why})") from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise UsageError(f"the file of keys {path} is empty; put one key on each line")
    return keys


@dataclass(frozen=True, slots=True)
class Access:
    """API keys and allowed hosts of one server.

    Attributes:
        users: Keys for /v1 and /metrics; none are required where it is empty.
        admins: Keys for /v1/prompts, valid for the rest, too; where empty, administration is off.
        hosts: Allowed Host headers; None allows all.
    """

    users: Keys
    admins: Keys
    hosts: frozenset[str] | None

    @classmethod
    def of(cls, settings: ServeSettings) -> Self:
        """Return the access of settings; raises UsageError if a key file cannot be read, or is empty."""
        # DNS rebinding: a page may resolve its own name to 127.0.0.1; its requests then carry that name.
        hosts = frozenset({*LOCAL_HOSTS, *settings.allowed_host}) if settings.is_local else None
        return cls(Keys.read(settings.api_key_file), Keys.read(settings.admin_key_file), hosts)

    def check_host(self, header: str) -> None:
        """Raise Problem 421 unless the Host header is allowed."""
        if self.hosts is None:
            return
        try:
            host = urlsplit(f"//{header}").hostname
        except ValueError:
            host = None
        if host not in self.hosts:
            raise Problem(421, f"this server is not {excerpt(header)!r}; start it with --allowed-host")

    def knows(self, headers: Headers) -> bool:
        """Whether a known key was sent, or none is required."""
        key = _bearer(headers)
        return not self.users or self.users.accept(key) | self.admins.accept(key)

    def check_user(self, request: Request) -> None:
        """Raise Problem 401 unless a known key was sent, where any are required."""
        if not self.knows(request.headers):
            raise _unknown_key()

    def check_admin(self, request: Request) -> None:
        """Raise Problem 403 where administration is off, 401 unless an administrator's key was sent."""
        if not self.admins:
            raise Problem(403, "administration is off; start the server with --admin-key-file")
        if not self.admins.accept(_bearer(request.headers)):
            raise _unknown_key()


def _bearer(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _unknown_key() -> Problem:
    return Problem(
        401,
        "expected a known key in the header 'Authorization: Bearer KEY'",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


@final
class Limits:
    """ASGI middleware: connection, body-size and slow-reader limits, and the check of the host."""

    def __init__(
        self, app: ASGIApp, settings: ServeSettings, access: Access, metrics: Metrics, connections: Connections
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
            if message["type"] == "http.response.start":
                if message["status"] >= 400:
                    self._metrics.refused.labels(str(message["status"])).inc()
                # A connection that is kept for probes alone is one less for those who have a key.
                if 2 * self._connections.count > self._settings.max_connections and self._is_stranger(scope):
                    message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
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

    def _is_stranger(self, scope: Scope) -> bool:
        """Whether a request is a probe, or has no known key where one is required."""
        return scope["path"] in _PROBES or not self._access.knows(Headers(scope=scope))

    def _check(self, headers: Headers, path: str) -> None:
        settings = self._settings
        self._access.check_host(headers.get("host", ""))
        if "content-length" in headers and "transfer-encoding" in headers:  # a proxy may read the other one
            raise Problem(400, "the request has Content-Length beside Transfer-Encoding; send one of them")
        # The request's own connection is counted, too. Who has no key, where one is required, makes no room.
        full = self._connections.count > settings.max_connections and path not in _PROBES
        if full and not (self._access.knows(headers) and self._connections.make_room()):
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
        """Return the next message; raises Problem 413 if the body is too large, 408 if it took too long."""
        if self._whole:
            return await self._receive()
        left = max(0.0, self._deadline - time.monotonic())
        try:
            message = await asyncio.wait_for(self._receive(), left)
        except TimeoutError:
            self.problem = Problem(408, "the request took too long to arrive; send it again")
            raise self.problem from None
        self._bytes += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._bytes > self._settings.max_body_bytes:
            self.problem = _too_large(self._settings.max_body_bytes)
            raise self.problem
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


def _too_large(most: int) -> Problem:
    return Problem(413, f"the request is larger than {most:,} bytes; send less at a time")


@final
class Connections:
    """The open connections of a uvicorn server; none under another ASGI server."""

    def __init__(self, server: uvicorn.Server | None = None) -> None:
        self._open: set[Any] = set()
        # Of each idle connection its last request, None before the first, and when it was first seen idle.
        self._silent: WeakKeyDictionary[Any, tuple[Any, float]] = WeakKeyDictionary()
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
        for each, since in self._idle(now):
            if now - since > seconds:
                each.transport.close()

    def make_room(self) -> bool:
        """Close the connection that has been idle longest; False where none is."""
        found = self._idle(time.monotonic())
        if found:
            min(found, key=lambda each: each[1])[0].transport.close()
        return bool(found)

    def _idle(self, now: float) -> list[tuple[Any, float]]:
        """Return the idle connections that nobody closes yet, and since when they are known to be idle."""
        found = []
        for each in list(self._open):
            cycle = each.cycle
            if cycle is not None and not cycle.response_complete:
                self._silent.pop(each, None)
                continue
            last, since = self._silent.get(each, (None, None))
            if since is None or last is not cycle:
                self._silent[each] = (cycle, now)
                since = now
            if not each.transport.is_closing():
                found.append((each, since))
        return found
