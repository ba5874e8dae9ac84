"""Targets scored by vLLM servers: one question for each place where they part.

vLLM gives no log-probabilities of an input with embeddings, but those of listed tokens at the first place behind it
(``logprob_token_ids``). So the targets of an input become a trie, and each of its inner nodes a request for one
token: input and the node's tokens go in, log p of the node's children comes out, before any sampling setting. A
server's prefix cache has the input after the first.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple, final

import torch
from torch import Tensor

from softprompt.engine import check_rows
from softprompt.errors import QueueFullError
from softprompt.generation import GenerationOptions, Request
from softprompt.server.upstream.answers import first_of, scores_of

if TYPE_CHECKING:
    from softprompt.backbone import Base
    from softprompt.engine import EngineRow
    from softprompt.generation import Bounds
    from softprompt.prompts import Prompt
    from softprompt.server.upstream.carriage import Carriage
    from softprompt.server.upstream.fleet import Fleet

_MOST_CHILDREN = 128
"""Tokens that vLLM lists for one request."""


class _Node(NamedTuple):
    """What stands before a target's token."""

    prompt: Prompt | None
    at: int
    ids: tuple[int, ...]


@final
class UpstreamScores:
    """Scores targets on servers elsewhere: the counterpart of ``Scorer``; see ``UpstreamAnswers`` for its parts.

    ``bounds.max_batch_rows`` requests are open at a time.
    """

    def __init__(self, base: Base, bounds: Bounds, carriage: Carriage, fleet: Fleet) -> None:
        self._base = base
        self._bounds = bounds
        self._carriage = carriage
        self._fleet = fleet
        self._waiting = 0
        self._room = asyncio.Semaphore(bounds.max_batch_rows)

    @property
    def healthy(self) -> bool:
        """Whether some server is not set aside."""
        return self._fleet.healthy

    def submit(self, rows: Sequence[EngineRow]) -> Future[Tensor]:
        """Return what will be the log-probability of each row's target, float32 ``[N]``.

        Raises:
            SoftPromptError: A row does not fit the model, or vLLM does not run its prompt.
            QueueFullError: Too many callers wait.
        """
        check_rows(self._base, rows)
        for prompt in {row.prompt for row in rows}:
            self._carriage.check(Request((), prompt))
        if self._waiting >= self._bounds.max_queue:
            raise QueueFullError(f"{self._waiting} requests wait already; try again later", 1.0)
        self._waiting += 1
        scores = self._fleet.run(self._scores(rows))
        scores.add_done_callback(self._done)  # of one that is cancelled before it begins, nothing runs
        return scores

    def stop(self) -> None:
        """Nothing: what waits ends with the servers' thread."""

    def _done(self, _: Future[Tensor]) -> None:
        self._waiting -= 1

    async def _scores(self, rows: Sequence[EngineRow]) -> Tensor:
        nodes: dict[_Node, dict[int, float]] = {}
        for row in rows:
            for node, token in _path(row):
                nodes.setdefault(node, {})[token] = math.nan
        try:
            async with asyncio.TaskGroup() as group:
                for node, children in nodes.items():
                    group.create_task(self._ask(node, children))
        except BaseExceptionGroup as error:
            raise first_of(error) from None
        return torch.tensor([math.fsum(nodes[node][token] for node, token in _path(row)) for row in rows])

    async def _ask(self, node: _Node, children: dict[int, float]) -> None:
        """Fill in log p of a node's children."""
        request = Request(node.ids, node.prompt, node.at, GenerationOptions(max_new_tokens=1), logprobs=1)
        listed = list(children)
        for start in range(0, len(listed), _MOST_CHILDREN):
            part = listed[start : start + _MOST_CHILDREN]
            more = {"stream": False, "logprob_token_ids": part}
            async with self._room:
                answer = await self._fleet.whole(
                    lambda facts, more=more: self._carriage.question(request, facts, **more)  # type: ignore[misc]
                )
            ((_, found),) = scores_of(answer["choices"][0])
            children.update({token: found[token] for token in part})


def _path(row: EngineRow) -> list[tuple[_Node, int]]:
    """Return each token of a row's target, with what stands before it."""
    return [
        (_Node(row.prompt, row.at, (*row.source, *row.target[:i])), token) for i, token in enumerate(row.target)
    ]
