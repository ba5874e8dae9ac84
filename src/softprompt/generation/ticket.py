"""What a caller of the batcher holds: a ticket that gives a request's events as they come, and cancels it."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, TypeVar, final

from softprompt.errors import ConfigError
from softprompt.generation.request import Request

_Submitted = TypeVar("_Submitted")

FinishReason = Literal["eos_token", "stop_sequence", "max_tokens", "time_limit"]

Reason = Literal["stop", "length", "time", "cancelled"]

TopLogProbs = tuple[tuple[int, float], ...]
"""The most likely tokens and their log-probabilities, in falling order."""

REASONS: dict[FinishReason, Reason] = {
    "eos_token": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "time_limit": "time",
}


@dataclass(frozen=True, slots=True)
class EchoEvent:
    """The input's own log-probabilities, before any sampling setting; sent once, before tokens.

    Attributes:
        token_ids: The input's tokens.
        logprobs: log p of each given what stands before it; None for the first.
        top_logprobs: The most likely tokens at the position of each; empty for the first.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    top_logprobs: tuple[TopLogProbs, ...]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token.

    Attributes:
        index: Which of the request's answers it belongs to.
        token_id: The token.
        text: What it adds to the answer's text. Characters come whole, and what may be the start of a
            stop sequence waits, so this may be empty or more than the token; together with the other
            events of the answer it is exactly the answer.
        logprob: log p of the token, before any sampling setting; None when the request does not want it.
        top_logprobs: The most likely tokens at its position.
    """

    index: int
    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: TopLogProbs = ()


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The end of one answer.

    Attributes:
        index: Which of the request's answers ended.
        reason: "stop", "length", "time" or "cancelled".
        text: The whole answer, as ``Generation.text``.
        tokens: Its tokens, the end token or stop sequence included.
        prompt_tokens: Virtual tokens of its prompt.
        input_tokens: Text tokens of its input.
        seed: The seed that repeats it; None when nothing was sampled.
        ended_by: As ``Generation.finish_reason``; None when cancelled.
    """

    index: int
    reason: Reason
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    input_tokens: int
    seed: int | None = None
    ended_by: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A generated answer.

    Attributes:
        text: The answer, without special tokens and without the stop sequence that ended it.
        input_token_count: Text tokens of the input; virtual tokens are not counted.
        generated_tokens: New tokens, the end token or stop sequence included.
        finish_reason: "eos_token", "stop_sequence", "max_tokens" or "time_limit".
        seed: The seed that repeats this answer; None when nothing was sampled.
        input_cut: Whether the input was longer than the prompt's limit and was truncated.
    """

    text: str
    input_token_count: int
    generated_tokens: int
    finish_reason: FinishReason
    seed: int | None = None
    input_cut: bool = False

    @classmethod
    def of(cls, end: FinishEvent, *, cut: bool) -> Self:
        """Return the answer that an event ends.

        Raises:
            ConfigError: It was cancelled.
        """
        if end.ended_by is None:
            raise ConfigError("the request was cancelled before its end, as serving was closed; ask again")
        return cls(end.text, end.input_tokens, len(end.tokens), end.ended_by, end.seed, cut)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


Event = EchoEvent | TokenEvent | FinishEvent


@final
class Ticket:
    """A submitted request: its events, its result, and a way to cancel it.

    Iterating, also with ``async for``, gives its events as they come and ends behind the last ``FinishEvent``; a
    failed request raises its error there. ``await ticket`` and ``result()`` give the finish events alone.
    """

    def __init__(self, request: Request, cancelled: Callable[[], object]) -> None:
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
                raise TimeoutError(f"the request is not done after {timeout} s; wait longer or cancel it")
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


def pieces(ticket: Ticket) -> Iterator[str]:
    """Yield the text of a ticket's first answer; an iterator that is dropped cancels the request."""
    found = _pieces(ticket)
    # Also one that was never begun, in which no "finally" runs.
    weakref.finalize(found, ticket.cancel).atexit = False
    return found


def async_pieces(ticket: Ticket) -> AsyncIterator[str]:
    """Yield as ``pieces``, without blocking the event loop."""
    found = _async_pieces(ticket)
    weakref.finalize(found, ticket.cancel).atexit = False
    return found


def _pieces(ticket: Ticket) -> Iterator[str]:
    try:
        for event in ticket:
            if isinstance(event, TokenEvent) and event.index == 0 and event.text:
                yield event.text
    finally:
        ticket.cancel()


async def _async_pieces(ticket: Ticket) -> AsyncIterator[str]:
    try:
        async for event in ticket:
            if isinstance(event, TokenEvent) and event.index == 0 and event.text:
                yield event.text
    finally:
        ticket.cancel()


async def in_thread(
    submit: Callable[[], list[_Submitted]], cancel: Callable[[_Submitted], object]
) -> list[_Submitted]:
    """Run ``submit``, which may block, in a thread, and return what it submitted.

    A caller who is cancelled meanwhile leaves nothing running: what the thread submits all the same
    is cancelled, by whichever of the two is later.
    """
    gone = threading.Event()
    found: list[_Submitted] = []

    def run() -> None:
        found.extend(submit())
        if gone.is_set():
            undo()

    def undo() -> None:
        for each in found:
            cancel(each)

    try:
        await asyncio.to_thread(run)
    except asyncio.CancelledError:
        gone.set()
        undo()
        raise
    return found
