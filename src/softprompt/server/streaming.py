"""Running requests and server-sent events: token events merged, counted, streamed, cancelled.

A client that disconnects cancels what it started, and every request ends within its time limit.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar, final

from fastapi import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from softprompt.generation import EchoEvent, Event, FinishEvent, Ticket, TokenEvent
from softprompt.server.errors import Problem, problem_of
from softprompt.server.metrics import Metrics

_SLACK = 1.0
"""Seconds on top of the time limit: the batcher ends answers at the limit by itself."""


@dataclass(slots=True)
class _Clock:
    """Time of an answer's latest token, by ``time.monotonic``."""

    last: float
    begun: bool = False


@final
@dataclass(slots=True)
class Run:
    """The batcher's running requests of one HTTP request.

    Attributes:
        tickets: One for each input.
        name: The prompt's name, for the metrics.
        metrics: Counts tokens, latencies and finish reasons.
        seconds: Time limit.
    """

    tickets: Sequence[Ticket]
    name: str
    metrics: Metrics
    seconds: float
    started: float = field(default_factory=time.monotonic)
    _clocks: dict[tuple[int, int], _Clock] = field(default_factory=dict)
    _ended: list[int] = field(default_factory=list)

    def cancel(self) -> None:
        """Cancel all unfinished requests; needed where ``events`` was never iterated."""
        for ticket in self.tickets:
            ticket.cancel()

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """Yield (input, event) in the order of events; leaving early cancels unfinished requests.

        Raises:
            Problem: 503, the time limit has passed, or the server is stopping.
            Exception: A request failed.
        """
        queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()
        pumps = [asyncio.create_task(_pump(i, each, queue)) for i, each in enumerate(self.tickets)]
        left = len(pumps)
        self._ended = [0] * left
        ended = False
        try:
            while left:
                remaining = self.started + self.seconds + _SLACK - time.monotonic()
                number, event = await asyncio.wait_for(queue.get(), remaining)
                if isinstance(event, Exception):
                    raise event
                if event is None:
                    self._ended[number] = self.tickets[number].request.n
                    left -= 1
                    continue
                if isinstance(event, FinishEvent) and event.reason == "cancelled":
                    # The server cancelled it: after a disconnect nothing reads these events.
                    raise Problem(503, "the server stopped before the answer was whole; ask again")
                self._count(number, event)
                yield number, event
            ended = True
        except TimeoutError:
            raise Problem(503, f"no answer within {self.seconds:g} s; try again later") from None
        finally:
            for pump in pumps:
                pump.cancel()
            if not ended:
                self.cancel()
                self.metrics.success.labels(self._label, "abort").inc(self._open_answers)

    @property
    def _open_answers(self) -> int:
        return sum(ticket.request.n for ticket in self.tickets) - sum(self._ended)

    @property
    def _label(self) -> str:
        return self.metrics.label(self.name)

    def _count(self, number: int, event: Event) -> None:
        now, label = time.monotonic(), self._label
        match event:
            case EchoEvent():
                return
            case TokenEvent():
                clock = self._clocks.setdefault((number, event.index), _Clock(self.started))
                which = self.metrics.between if clock.begun else self.metrics.first
                which.labels(label).observe(now - clock.last)
                clock.last, clock.begun = now, True
            case FinishEvent():
                self._ended[number] += 1
                self.metrics.success.labels(label, event.reason).inc()
                self.metrics.generated.labels(label).inc(len(event.tokens))
                self.metrics.whole.labels(label).observe(now - self.started)
                if event.index == 0:
                    self.metrics.input.labels(label).inc(event.input_tokens)
                    self.metrics.virtual.labels(label).inc(event.prompt_tokens)


async def _pump(
    number: int, ticket: Ticket, queue: asyncio.Queue[tuple[int, Event | Exception | None]]
) -> None:
    try:
        async for event in ticket:
            queue.put_nowait((number, event))
    except Exception as error:  # raised by the consumer of the queue
        queue.put_nowait((number, error))
    else:
        queue.put_nowait((number, None))


async def until_gone(request: Request) -> None:
    """Return when the client has disconnected."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


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
"""OpenAPI description of a streamed response."""
CLIENT_GONE = 499
"""Status in access logs when the client has disconnected (nginx's 499)."""


@final
class EventStream(Response):
    """Server-sent events of a streamed response, ended by ``[DONE]`` as OpenAI's are."""

    media_type = "text/event-stream"

    def __init__(self, run: Run, pieces: AsyncGenerator[Mapping[str, Any]]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._run = run
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; on any exit unfinished requests are cancelled."""
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
    except Exception as error:  # the status has been sent; the error becomes an event
        yield _line(problem_of(error).body)
    yield _DONE


def _line(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


async def unless_gone(
    request: Request, answer: Awaitable[Result], cancel: Callable[[], object]
) -> Result | None:
    """Await an answer; None when the client disconnects, which cancels it."""
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
            # Retrieve an exception raised by the cancellation, so that asyncio does not log it.
            _ = working.cancelled() or working.exception()
