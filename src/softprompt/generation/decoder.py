"""Requests in the caller's thread: the same runners as the batcher's, without a queue or a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Self, final

from softprompt.backbone import Base
from softprompt.engine import why_undecodable
from softprompt.errors import ConfigError
from softprompt.generation.answer import AnswerRules, Job
from softprompt.generation.fallback_runner import FallbackRunner, PaddedGenerate, beam_search
from softprompt.generation.forest_runner import ForestRunner
from softprompt.generation.options import Bounds
from softprompt.generation.request import Decode, Request, check_request
from softprompt.generation.ticket import FinishEvent, Ticket

_UNBOUNDED = 2**62
"""Tokens of a KV cache whose buffers grow as they are needed."""


Runner = ForestRunner | FallbackRunner
"""Runs jobs; all but ``check`` is called by one thread."""


def runner_of(base: Base, bounds: Bounds, rules: AnswerRules) -> Runner:
    """Return the fastest runner that gives each request its solo answer on this base."""
    if why_undecodable(base):
        return FallbackRunner(base, bounds, rules)
    return ForestRunner(base, bounds)


@final
class Decoder:
    """Answers lists of requests; keeps its runner, and the prompts' keys and values, from call to call.

    Any thread may call; calls take turns. The base is put into evaluation mode. ``decode`` turns token ids
    into text; None is the tokenizer's, special tokens left out.
    """

    def __init__(
        self, base: Base, bounds: Bounds | None = None, *, decode: Decode | None = None
    ) -> None:
        base.model.eval()  # type: ignore[no-untyped-call]
        self._base = base
        self._bounds = bounds or Bounds()
        self._rules = AnswerRules.of(base, decode, offline=True)
        self._guard = threading.Lock()
        self._runner: Runner | None = None

    @classmethod
    def of_batches(cls, base: Base, batch_size: int) -> Self:
        """Return one for lists whose inputs are of any length, which are bounded by the batch size alone.

        Raises:
            ConfigError: The batch size is less than 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size expects at least 1 row, got {batch_size}")
        bounds = Bounds(
            max_batch_rows=batch_size,
            max_step_tokens=max(Bounds().max_step_tokens, batch_size),
            max_cached_tokens=_UNBOUNDED,
            ordered_weights=False,
        )
        return cls(base, bounds)

    def run(self, requests: Sequence[Request]) -> list[tuple[FinishEvent, ...]]:
        """Return the answers to each request, in order; ``max_time`` counts from when a request starts.

        Raises:
            SoftPromptError: A request could never be run, or the model failed on it.
        """
        tickets = [Ticket(request, _ignore) for request in requests]
        # Rows of like length share a batch, which keeps the padding small.
        order = sorted(tickets, key=lambda ticket: len(ticket.request.ids))
        beams = [ticket for ticket in order if ticket.request.options.num_beams > 1]
        others = [ticket for ticket in order if ticket.request.options.num_beams == 1]
        with self._guard:
            if beams:
                self._search(beams)
            if others:
                self._run(others)
        return [ticket.result() for ticket in tickets]

    def _run(self, tickets: Sequence[Ticket]) -> None:
        # A runner that raised may hold rows, and is not used again.
        runner = self._runner or runner_of(self._base, self._bounds, self._rules)
        self._runner = None
        for ticket in tickets:
            runner.check(ticket.request)
        waiting, held = deque(tickets), list[Job]()
        while waiting or held or runner.rows:
            rows = runner.rows + sum(job.request.n for job in held)
            while waiting and rows + waiting[0].request.n <= self._bounds.max_batch_rows:
                held.append(Job.of(waiting.popleft(), self._rules))
                rows += held[-1].request.n
            held = [job for job in held if runner.admit(job) != "started"]
            runner.step()
        self._runner = runner

    def _search(self, tickets: Sequence[Ticket]) -> None:
        """Run beam search, batch after batch."""
        generate = PaddedGenerate(self._base, self._bounds, self._rules.eos_ids)
        batch: list[Ticket] = []
        for ticket in tickets:
            check_request(self._base, ticket.request)
            if ticket.request.n > 1 or ticket.request.echo:
                raise ConfigError("beam search gives one answer, and no log-probabilities")
            grown = [each.request for each in (*batch, ticket)]
            alike = len({each.options for each in grown}) == 1
            if batch and not (alike and generate.fits(grown)):
                beam_search(generate, [Job.of(each, self._rules) for each in batch])
                batch = []
            batch.append(ticket)
        beam_search(generate, [Job.of(each, self._rules) for each in batch])


def run_requests(
    base: Base, requests: Sequence[Request], bounds: Bounds | None = None
) -> list[tuple[FinishEvent, ...]]:
    """Return the answers to each request, run in the caller's thread; see ``Decoder``."""
    return Decoder(base, bounds).run(requests)


def _ignore() -> None:
    """Nobody cancels a request of a list."""
