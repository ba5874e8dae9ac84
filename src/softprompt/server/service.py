"""The service behind the routes: prompts, batcher, scorer, access, metrics, and its life cycle."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar, cast

import anyio
from fastapi import Depends
from fastapi import Request as HTTPRequest

from softprompt.backbone import input_embedding
from softprompt.errors import NotServingError
from softprompt.generation import Batcher, Request, Scorer, Ticket
from softprompt.inference import Task
from softprompt.inspection import describe
from softprompt.server.access import Access
from softprompt.server.folder import tasks_of
from softprompt.server.limits import Connections
from softprompt.server.metrics import Metrics
from softprompt.server.registry import Registry
from softprompt.server.replies import TokenTexts
from softprompt.server.served import Served
from softprompt.server.settings import ServeSettings
from softprompt.server.streaming import Run

logger = logging.getLogger(__name__)

P = ParamSpec("P")
Result = TypeVar("Result")
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
    """

    settings: ServeSettings
    registry: Registry
    batcher: Batcher
    scorer: Scorer
    access: Access
    metrics: Metrics
    tokens: TokenTexts
    draining: bool = False
    should_stop: Callable[[], bool] = lambda: False
    connections: Connections = field(default_factory=Connections)
    _cards: OrderedDict[tuple[str, str], dict[str, Any]] = field(default_factory=OrderedDict)

    async def served(self, name: str, task: Task | None) -> Served:
        """Return the current version of a prompt, loading it if needed."""
        return await in_thread(self.registry.get, name, task)

    def start(self, served: Served, requests: Sequence[Request]) -> Run:
        """Submit requests, all of them or none.

        Raises:
            SoftPromptError: The queue is full, or a request does not fit the model.
        """
        tickets: list[Ticket] = []
        try:
            for request in requests:
                tickets.append(self.batcher.submit(request))
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return Run(tickets, served.name, self.metrics, self.settings.request_seconds)

    def card(self, name: str) -> dict[str, Any]:
        """Return a prompt's card as plain JSON values; an LRU cache keeps the latest ones."""
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
                "base_model": base.name,
                "version": version,
                "history": list(stored.manifest.history) if stored.manifest else None,
                "tasks": tasks_of(stored.config, stored.manifest),
            }
            # A prompt may hold numbers that JSON has no word for.
            card: dict[str, Any] = json.loads(json.dumps(found), parse_constant=lambda _: None)
            self._cards[key] = card
            while len(self._cards) > _CARDS:
                self._cards.popitem(last=False)
            return card
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


USER, ADMIN = Depends(_user), Depends(_admin)
"""Dependencies of routes that require a user's or an administrator's key."""
