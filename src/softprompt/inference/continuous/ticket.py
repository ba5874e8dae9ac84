"""What a caller holds while its request waits and runs: events as they come, and a way to stop it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any, final

from softprompt.inference.continuous.events import Event, FinishEvent
from softprompt.inference.continuous.request import Request


@final
class Ticket:
    """A request on its way.

    Iterating, also with ``async for``, gives its events as they come and ends behind the last
    ``FinishEvent``; a failed request raises its error there. ``await ticket`` and ``result()``
    give the finish events alone.
    """

    def __init__(self, request: Request, cancelled: Callable[[], None]) -> None:
        self.request = request
        self._notify_cancelled = cancelled
        self._events: list[Event] = []
        self._error: Exception | None = None
        self._closed = False
        self._cancelled = False
        self._changed = threading.Condition()
        self._wakers: set[Callable[[], None]] = set()

    def cancel(self) -> None:
        """Stop the request; its unfinished answers end with the reason "cancelled"."""
        if not self._cancelled:
            self._cancelled = True
            self._notify_cancelled()

    @property
    def is_cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._cancelled

    @property
    def is_done(self) -> bool:
        """Whether the last event is there."""
        return self._closed

    def result(self, timeout: float | None = None) -> tuple[FinishEvent, ...]:
        """Wait for the end and return the answers in order.

        Raises:
            TimeoutError: It took longer than ``timeout`` seconds.
            Exception: Whatever the request failed with.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed, timeout):
                raise TimeoutError(
                    f"the request is not done after {timeout} s; wait longer or cancel it"
                )
        return self._answers()

    def __iter__(self) -> Iterator[Event]:
        """Yield events as they come."""
        seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda seen=seen: self._closed or len(self._events) > seen)  # type: ignore[misc]
                new, closed = self._events[seen:], self._closed
            yield from new
            seen += len(new)
            if closed:
                break
        if self._error is not None:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield events as they come, without blocking the event loop."""
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(ready.set)

        seen = 0
        with self._changed:
            self._wakers.add(wake)
        try:
            while True:
                ready.clear()
                with self._changed:
                    new, closed = self._events[seen:], self._closed
                for event in new:
                    yield event
                seen += len(new)
                if closed:
                    break
                if not new:
                    await ready.wait()
        finally:
            with self._changed:
                self._wakers.discard(wake)
        if self._error is not None:
            raise self._error

    def __await__(self) -> Generator[Any, None, tuple[FinishEvent, ...]]:
        """Wait for the end and return the answers in order."""
        return self._awaited().__await__()

    async def _awaited(self) -> tuple[FinishEvent, ...]:
        async for _ in self:
            pass
        return self._answers()

    def push(self, *events: Event, last: bool = False, error: Exception | None = None) -> None:
        """Add events; the worker's side of the ticket, without effect behind the last one."""
        with self._changed:
            if self._closed:
                return
            self._events += events
            if error is not None:
                self._error = error
            self._closed = last or error is not None
            self._changed.notify_all()
            wakers = list(self._wakers)
        for wake in wakers:
            wake()

    def _answers(self) -> tuple[FinishEvent, ...]:
        if self._error is not None:
            raise self._error
        ends = [event for event in self._events if isinstance(event, FinishEvent)]
        return tuple(sorted(ends, key=lambda event: event.index))
