"""What the routes of one server share."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar, cast

import anyio
from fastapi import Depends, Request

from softprompt.backbone import input_embedding
from softprompt.errors import NotServingError
from softprompt.inference import Scorer, Task
from softprompt.inspection import describe
from softprompt.server.access import Access
from softprompt.server.backend import Backend
from softprompt.server.connections import Connections
from softprompt.server.meter import Meter
from softprompt.server.outline import tasks_of
from softprompt.server.registry import Registry
from softprompt.server.replies import TokenTexts
from softprompt.server.run import Run, submit_all
from softprompt.server.served import Served
from softprompt.server.settings import ServeSettings

logger = logging.getLogger(__name__)

P = ParamSpec("P")
Result = TypeVar("Result")
_CARDS = 64
_LOOK_SECONDS = 0.1


@dataclass(slots=True)
class Service:
    """The parts of a running server.

    Attributes:
        settings: What it was told.
        registry: The prompts.
        batcher: Generates.
        scorer: Scores labels.
        access: Who may ask.
        meter: Counts.
        tokens: What single tokens are called.
        draining: Whether it is about to stop.
        stop_asked: Tells whether the server was told to.
        connections: Those that are open; None without a server of ours around the app.
    """

    settings: ServeSettings
    registry: Registry
    batcher: Backend
    scorer: Scorer
    access: Access
    meter: Meter
    tokens: TokenTexts
    draining: bool = False
    stop_asked: Callable[[], bool] = lambda: False
    connections: Connections | None = None
    _cards: OrderedDict[tuple[str, str], dict[str, Any]] = field(default_factory=OrderedDict)

    async def served(self, name: str, task: Task | None) -> Served:
        """Return the present version of a prompt."""
        return await in_thread(self.registry.get, name, task)

    def run(self, served: Served, requests: Any) -> Run:
        """Start requests, all of them or none."""
        tickets = submit_all(self.batcher, requests)
        return Run(tickets, served.name, self.meter, self.settings.request_seconds)

    def card(self, name: str) -> dict[str, Any]:
        """Return what is known of a prompt, in plain JSON values."""
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
        """Look at the prompts' folder and at the connections now and then."""
        while True:
            await asyncio.sleep(self.settings.poll_seconds)
            if self.connections is not None:
                self.connections.close_silent(self.settings.body_seconds)
            try:
                await in_thread(self.registry.poll)
            except (OSError, NotServingError) as error:  # a share that is away may come back
                logger.warning("the folder of prompts cannot be looked at: %s", error)

    async def end_in_time(self) -> None:
        """Once told to stop, give running answers their time; then end them, which tells clients so."""
        while not self.stop_asked():
            await asyncio.sleep(_LOOK_SECONDS)
        self.draining = True
        seconds = self.settings.drain_seconds
        # No thread waits for the end: a second Ctrl-C would have to wait for that thread.
        await asyncio.to_thread(self.batcher.drain, 0)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(self.stop)

    def stop(self) -> None:
        """End all work; what has not ended by itself fails."""
        self.scorer.stop()
        self.batcher.stop()


async def in_thread(function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """Run what would hold up the event loop: files, tokenizers."""
    return await anyio.to_thread.run_sync(functools.partial(function, *args, **kwargs))


def service_of(request: Request) -> Service:
    """Return the service of an app, for routes."""
    return cast(Service, request.app.state.service)


def _user(request: Request) -> None:
    service_of(request).access.check_user(request)


def _admin(request: Request) -> None:
    service_of(request).access.check_admin(request)


USER, ADMIN = Depends(_user), Depends(_admin)
"""For routes that ask for a key."""
