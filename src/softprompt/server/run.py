"""The requests of one call while they run: their events in one stream, counted, and ended in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import final

from fastapi import Request as HTTPRequest

from softprompt.inference import EchoEvent, Event, FinishEvent, Ticket, TokenEvent
from softprompt.inference.continuous.request import Request
from softprompt.server.backend import Backend
from softprompt.server.meter import Meter
from softprompt.server.problems import Problem

_SLACK = 1.0
"""Seconds that the batcher, which ends answers by itself, gets on top of their time."""


def submit_all(batcher: Backend, requests: Sequence[Request]) -> list[Ticket]:
    """Submit requests, all of them or none."""
    tickets: list[Ticket] = []
    try:
        for request in requests:
            tickets.append(batcher.submit(request))
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise
    return tickets


@dataclass(slots=True)
class _Clock:
    """When an answer last grew."""

    last: float
    begun: bool = False


@final
@dataclass(slots=True)
class Run:
    """The requests of one call.

    Attributes:
        tickets: One for each input.
        name: The prompt they name, for the metrics.
        meter: Where they are counted.
        seconds: Time they may take.
    """

    tickets: Sequence[Ticket]
    name: str
    meter: Meter
    seconds: float
    started: float = field(default_factory=time.monotonic)
    _clocks: dict[tuple[int, int], _Clock] = field(default_factory=dict)
    _ended: list[int] = field(default_factory=list)

    def cancel(self) -> None:
        """Stop what still runs; an iteration that never began cannot do so itself."""
        for ticket in self.tickets:
            ticket.cancel()

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """Yield (input, event) as they come; leaving early cancels what still runs.

        Raises:
            Problem: 503 when the time was over before anything came, or the server stopped.
            Exception: What a request failed with.
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
                    # Where the client hung up, nobody reads this.
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
                self.meter.success.labels(self._label, "abort").inc(self._open_answers)

    @property
    def _open_answers(self) -> int:
        return sum(ticket.request.n for ticket in self.tickets) - sum(self._ended)

    @property
    def _label(self) -> str:
        return self.meter.label(self.name)

    def _count(self, number: int, event: Event) -> None:
        now, label = time.monotonic(), self._label
        match event:
            case EchoEvent():
                return
            case TokenEvent():
                clock = self._clocks.setdefault((number, event.index), _Clock(self.started))
                which = self.meter.between if clock.begun else self.meter.first
                which.labels(label).observe(now - clock.last)
                clock.last, clock.begun = now, True
            case FinishEvent():
                self._ended[number] += 1
                self.meter.success.labels(label, event.reason).inc()
                self.meter.generated.labels(label).inc(len(event.tokens))
                self.meter.whole.labels(label).observe(now - self.started)
                if event.index == 0:
                    self.meter.input.labels(label).inc(event.input_tokens)
                    self.meter.virtual.labels(label).inc(event.prompt_tokens)


async def _pump(
    number: int, ticket: Ticket, queue: asyncio.Queue[tuple[int, Event | Exception | None]]
) -> None:
    try:
        async for event in ticket:
            queue.put_nowait((number, event))
    except Exception as error:  # told to whoever waits for the events
        queue.put_nowait((number, error))
    else:
        queue.put_nowait((number, None))


async def until_gone(request: HTTPRequest) -> None:
    """Return when the client has hung up."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return
