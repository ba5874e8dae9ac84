"""Targets scored by vLLM servers: one question for each place in a tree of the targets.

vLLM gives no log-probabilities of an input with embeddings, but those of listed tokens at the first place behind it
(``logprob_token_ids``). So the targets of an input become a trie, and each of its inner nodes a request for one
token: input and the node's tokens go in, log p of the node's children comes out, before any sampling setting. A
server's prefix cache has the input after the first.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from torch import Tensor

from softprompt.engine import check_rows
from softprompt.errors import ConfigError, QueueFullError, UpstreamError
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
_MOST_TOKENS = 100_000
"""Tokens of all targets of one caller."""


class _Node(NamedTuple):
    """What stands before a target's token: the source of a row, and the target's tokens so far."""

    row: int
    """Number of the first row of that source, so that sources, which may be long, are kept once."""
    target: tuple[int, ...]


@final
class UpstreamScores:
    """Scores targets on servers elsewhere: the counterpart of ``Scorer``; see ``UpstreamAnswers`` for its parts.

    ``bounds.max_batch_rows`` requests are open at a time; callers who want more of them take turns.
    """

    def __init__(self, base: Base, bounds: Bounds, carriage: Carriage, fleet: Fleet) -> None:
        self._base = base
        self._bounds = bounds
        self._carriage = carriage
        self._fleet = fleet
        self._open = set[Future[Tensor]]()
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
        if (tokens := sum(len(row.target) for row in rows)) > _MOST_TOKENS:
            raise ConfigError(
                f"the labels of all texts have {tokens:,} tokens, vLLM is asked for at most {_MOST_TOKENS:,}; "
                "send fewer texts at a time, or serve with --engine own"
            )
        if len(self._open) >= self._bounds.max_queue:
            raise QueueFullError(f"{len(self._open)} requests wait already; try again later", 1.0)
        paths = _paths(rows)
        nodes: dict[_Node, dict[int, float]] = {}
        for node, token in (step for path in paths for step in path):
            nodes.setdefault(node, {})[token] = math.nan
        scores = self._fleet.run(self._scores(rows, paths, nodes))
        self._open.add(scores)
        scores.add_done_callback(self._open.discard)  # of one that is cancelled before it begins, nothing runs
        return scores

    def stop(self) -> None:
        """Nothing: what waits ends with the servers' thread."""

    async def _scores(
        self, rows: Sequence[EngineRow], paths: Sequence[_Path], nodes: dict[_Node, dict[int, float]]
    ) -> Tensor:
        left = iter(nodes.items())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(nodes), self._bounds.max_batch_rows)):
                    group.create_task(self._ask_each(rows, left))
        except BaseExceptionGroup as error:
            raise first_of(error) from None
        return torch.tensor([math.fsum(nodes[node][token] for node, token in path) for path in paths])

    async def _ask_each(self, rows: Sequence[EngineRow], left: Iterator[tuple[_Node, dict[int, float]]]) -> None:
        """Fill in log p of the children of nodes until none is left."""
        for node, children in left:
            row = rows[node.row]
            options = GenerationOptions(max_new_tokens=1)
            request = Request((*row.source, *node.target), row.prompt, row.at, options, logprobs=1)
            listed = list(children)
            for start in range(0, len(listed), _MOST_CHILDREN):
                children.update(await self._ask(request, listed[start : start + _MOST_CHILDREN]))

    async def _ask(self, request: Request, listed: Sequence[int]) -> dict[int, float]:
        """Return log p of listed tokens behind an input."""
        more: dict[str, Any] = {"stream": False, "logprob_token_ids": listed}
        async with self._room:
            answer = await self._fleet.whole(lambda facts: self._carriage.question(request, facts, **more))
        ((_, found),) = scores_of(answer["choices"][0])
        if not found.keys() >= set(listed):
            raise UpstreamError(
                "the vLLM server behind this one lacks log-probabilities of listed tokens; it takes vLLM 0.32"
            )
        return {token: found[token] for token in listed}


_Path = list[tuple[_Node, int]]


def _paths(rows: Sequence[EngineRow]) -> list[_Path]:
    """Return, for each row, each token of its target with what stands before it."""
    first: dict[tuple[Prompt | None, int, tuple[int, ...]], int] = {}
    numbers = [first.setdefault((row.prompt, row.at, row.source), i) for i, row in enumerate(rows)]
    return [
        [(_Node(number, row.target[:i]), token) for i, token in enumerate(row.target)]
        for number, row in zip(numbers, rows, strict=True)
    ]
