"""The service behind the routes: its parts and life cycle, running requests, server-sent events.

A client that disconnects cancels what it started, and every request ends within its time limit.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast, final

import anyio
from fastapi import Depends
from fastapi import Request as HTTPRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from softprompt.backbone import input_embedding
from softprompt.errors import ConfigError, NotServingError, excerpt
from softprompt.generation import EchoEvent, Event, FinishEvent, Request, Ticket, TokenEvent
from softprompt.inspection import describe
from softprompt.server.access_log import tally
from softprompt.server.errors import Problem, problem_of
from softprompt.server.folder import tasks_of
from softprompt.server.middleware import Connections

if TYPE_CHECKING:
    from softprompt.generation import AnswerSource, ScoreSource
    from softprompt.inference import Task
    from softprompt.server.logprobs import TokenTexts
    from softprompt.server.metrics import Metrics
    from softprompt.server.middleware import Access
    from softprompt.server.registry import Registry
    from softprompt.server.served import Served
    from softprompt.server.settings import ServeSettings

logger = logging.getLogger(__name__)

P = ParamSpec("P")
Result = TypeVar("Result")
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}
"""OpenAPI description of a streamed response."""
CLIENT_GONE = 499
"""Status in access logs when the client has disconnected (nginx's 499)."""
_SLACK = 1.0
"""Seconds on top of the time limit: the batcher ends answers at the limit by itself."""
_CARDS = 64
_POLL_SECONDS = 0.1


@dataclass(slots=True)
class Service:
    """The parts of a running server.

    Attributes:
        settings: Its settings.
        registry: The prompts.
        batcher: Generates.
        scorer: Scores labels.
        access: API keys and allowed hosts.
        metrics: Prometheus metrics.
        tokens: Texts of single tokens, for log-probabilities.
        draining: Whether running answers are being finished before the end.
        should_stop: Whether the server has received a signal to stop.
        connections: The open connections.
        embedding: Lets embeddings be computed one request at a time, as the base is one.
    """

    settings: ServeSettings
    registry: Registry
    batcher: AnswerSource
    scorer: ScoreSource
    access: Access
    metrics: Metrics
    tokens: TokenTexts
    draining: bool = False
    should_stop: Callable[[], bool] = lambda: False
    connections: Connections = field(default_factory=Connections)
    embedding: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))
    _cards: OrderedDict[tuple[str, str], dict[str, Any]] = field(default_factory=OrderedDict)
    _put_otherwise: set[str] = field(default_factory=set)

    async def served(self, name: str, task: Task | None, *, embeds: bool = False) -> Served:
        """Return the current version of a prompt, loading it if needed.

        Raises:
            ConfigError: The prompt is one for embeddings, and the request wants an answer, or the other way round.
            SoftPromptError: There is no such prompt, or it cannot be served.
        """
        if embeds and self.settings.engine == "vllm":
            raise ConfigError("vectors are not served with --engine vllm; ask a server with --engine own")
        found = await in_thread(self.registry.get, name, task)
        tally(prompt=found.name)
        if found.own is not None and embeds != (found.own.config.task_type == "FEATURE_EXTRACTION"):
            raise ConfigError(
                f"the prompt {found.name!r} is for {found.own.config.task_type}; "
                + ("ask for an answer" if embeds else "ask /v1/embeddings")
            )
        return found

    def note_chat(self, served: Served) -> None:
        """Warn, once for each prompt, that chats are put otherwise than the inputs it was trained on."""
        if served.chat is False and served.manifest and served.name not in self._put_otherwise:
            self._put_otherwise.add(served.name)
            logger.warning(
                "the prompt %s was trained with its template %r, and is asked in chats, which the base's chat "
                "template puts; /v1/completions puts texts as in its training",
                served.name,
                excerpt(served.manifest.template),
            )

    def start(self, served: Served, requests: Sequence[Request]) -> Run:
        """Submit requests, all of them or none.

        Raises:
            Problem: 400, they want more answers than ``max_request_rows``.
            SoftPromptError: The queue is full, or a request does not fit the model.
        """
        self.check_answers(requests)
        tickets: list[Ticket] = []
        try:
            for request in requests:
                tickets.append(self.batcher.submit(request))
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return Run(tickets, served.name, self.metrics, self.settings.request_seconds)

    def check_answers(self, requests: Sequence[Request]) -> None:
        """Raise Problem 400 where requests want more answers than ``max_request_rows``."""
        rows, most = sum(each.n for each in requests), self.settings.max_request_rows
        if rows > most:
            raise Problem(400, f"the request has {rows} answers, this server allows {most}")

    def count(self, served: Served, reason: str, rows: int, tokens: int, started: float) -> dict[str, int]:
        """Count inputs that got no generated answer, and return their usage.

        ``tokens`` are those of all ``rows`` inputs; ``started`` is in seconds of the monotonic clock.
        """
        label = self.metrics.label(served.name)
        virtual = served.prompt.tokens * rows if served.prompt else 0
        tally(tokens=tokens, virtual=virtual)
        self.metrics.input.labels(label).inc(tokens)
        self.metrics.virtual.labels(label).inc(virtual)
        self.metrics.success.labels(label, reason).inc(rows)
        self.metrics.whole.labels(label).observe(time.monotonic() - started)
        return {"prompt_tokens": tokens, "virtual_tokens": virtual, "total_tokens": tokens}

    def card(self, name: str) -> dict[str, Any]:
        """Return a prompt's card as plain JSON values; the latest ones are kept."""
        stored, version = self.registry.stored(name)
        key = (name, version)
        if key not in self._cards:
            base = self.registry.base
            table = input_embedding(base.model).weight
            found = describe(stored, table, base.tokenizer).to_dict()
            found |= {
                "location": name,
                "name": name,
                # Clients know the base by its name, not by somebody's path.
                "base_model": self.registry.base_names[0],
                "version": version,
                "history": list(stored.manifest.history) if stored.manifest else None,
                "tasks": tasks_of(stored.config, stored.manifest),
            }
            # A prompt may hold numbers that JSON has no word for.
            self._cards[key] = json.loads(json.dumps(found), parse_constant=lambda _: None)
            if len(self._cards) > _CARDS:
                self._cards.popitem(last=False)
        return self._cards[key]

    async def watch(self) -> None:
        """Poll the folder of prompts, and close idle connections, until cancelled."""
        while True:
            await asyncio.sleep(self.settings.poll_seconds)
            self.connections.close_silent(self.settings.body_seconds)
            try:
                await in_thread(self.registry.poll)
            except (OSError, NotServingError) as error:  # a network share may return
                logger.warning("the folder of prompts cannot be read: %s", error)

    async def end_in_time(self) -> None:
        """After a signal to stop, let running answers finish in their time, then end them with an error."""
        while not self.should_stop():
            await asyncio.sleep(_POLL_SECONDS)
        self.draining = True
        seconds = self.settings.drain_seconds
        # No thread waits here: a second Ctrl-C would have to wait for that thread.
        await asyncio.to_thread(self.batcher.drain, 0)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(self.stop)

    def stop(self) -> None:
        """Stop scorer and batcher; unfinished requests fail."""
        self.scorer.stop()
        self.batcher.stop()


async def in_thread(function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """Run a blocking call, on files or tokenizers, off the event loop."""
    return await anyio.to_thread.run_sync(functools.partial(function, *args, **kwargs))


def service_of(request: HTTPRequest) -> Service:
    """Return the service of a request's application."""
    return cast(Service, request.app.state.service)


def _user(request: HTTPRequest) -> None:
    service_of(request).access.check_user(request)


def _admin(request: HTTPRequest) -> None:
    service_of(request).access.check_admin(request)


class Answering(Protocol):
    """What answers an HTTP request, event by event."""

    def cancel(self) -> None:
        """Stop what has not ended."""

    def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """Yield (input, event) in the order of events."""


USER, ADMIN = Depends(_user), Depends(_admin)
"""Dependencies of routes that require a user's or an administrator's key."""


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
    _latest: dict[tuple[int, int], float] = field(default_factory=dict)
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
                left_open = sum(ticket.request.n for ticket in self.tickets) - sum(self._ended)
                self.metrics.success.labels(self._label, "abort").inc(left_open)

    @property
    def _label(self) -> str:
        return self.metrics.label(self.name)

    def _count(self, number: int, event: Event) -> None:
        now, label = time.monotonic(), self._label
        match event:
            case EchoEvent():
                return
            case TokenEvent():
                answer = (number, event.index)
                which = self.metrics.between if answer in self._latest else self.metrics.first
                which.labels(label).observe(now - self._latest.get(answer, self.started))
                self._latest[answer] = now
            case FinishEvent():
                self._ended[number] += 1
                self.metrics.success.labels(label, event.reason).inc()
                self.metrics.generated.labels(label).inc(len(event.tokens))
                self.metrics.whole.labels(label).observe(now - self.started)
                tally(output=len(event.tokens))
                if event.index == 0:
                    tally(tokens=event.input_tokens, virtual=event.prompt_tokens)
                    self.metrics.input.labels(label).inc(event.input_tokens)
                    self.metrics.virtual.labels(label).inc(event.prompt_tokens)


async def _pump(number: int, ticket: Ticket, queue: asyncio.Queue[tuple[int, Event | Exception | None]]) -> None:
    try:
        async for event in ticket:
            queue.put_nowait((number, event))
    except Exception as error:  # raised by the consumer of the queue
        queue.put_nowait((number, error))
    else:
        queue.put_nowait((number, None))


@final
class EventStream(Response):
    """Server-sent events of a streamed response, ended by ``[DONE]`` as OpenAI's are."""

    media_type = "text/event-stream"

    def __init__(self, run: Answering, pieces: AsyncGenerator[Mapping[str, Any]]) -> None:
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
    yield b"data: [DONE]\n\n"


def _line(value: Mapping[str, Any]) -> bytes:
    # Clients of /v1/responses may go by the name of an event.
    name = f"event: {value['type']}\n".encode() if "type" in value else b""
    return name + b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


async def unless_gone(
    request: HTTPRequest, answer: Awaitable[Result], cancel: Callable[[], object]
) -> Result | None:
    """Await an answer; None when the client disconnects, which cancels it."""
    working = asyncio.ensure_future(answer)
    gone = asyncio.create_task(_until_gone(request))
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


async def _until_gone(request: HTTPRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
