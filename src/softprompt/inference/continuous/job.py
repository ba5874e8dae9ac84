"""A request that a runner has taken: its answers, and what of it was told."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from softprompt.inference.continuous.answer import Answer
from softprompt.inference.continuous.events import Event, FinishEvent
from softprompt.inference.continuous.request import Decode, Request
from softprompt.inference.continuous.ticket import Ticket
from softprompt.inference.sampling import row_seeds


@dataclass(slots=True, eq=False)
class Job:
    """A request, its ticket, and its answers.

    Attributes:
        ticket: Where its events go.
        answers: Its answers; none when only its input is scored.
        deadline: When its time is over, by ``time.monotonic``.
        ended: Answers whose end was told.
    """

    ticket: Ticket
    answers: list[Answer]
    deadline: float
    ended: set[int] = field(default_factory=set)

    @classmethod
    def of(
        cls, ticket: Ticket, decode: Decode, eos_ids: frozenset[int], *, seq2seq: bool = False
    ) -> Job:
        """Prepare a request; its time starts now."""
        request = ticket.request
        limit = request.options.max_time
        deadline = math.inf if limit is None else time.monotonic() + limit
        own = request.decode or decode
        # An encoder's input is no part of the text that goes on.
        text = () if seq2seq else request.ids
        answers = [
            Answer(request, i, seed, own, eos_ids, text, deadline)
            for i, seed in enumerate(_seeds(request))
            if request.generate
        ]
        return cls(ticket, answers, deadline)

    @property
    def request(self) -> Request:
        """What is asked."""
        return self.ticket.request

    @property
    def is_over(self) -> bool:
        """Whether it was cancelled or its time is over."""
        return self.ticket.is_cancelled or time.monotonic() >= self.deadline

    def tell(self, events: Sequence[Event]) -> None:
        """Tell what came; the end of the last answer closes the ticket."""
        self.ended |= {event.index for event in events if isinstance(event, FinishEvent)}
        self.ticket.push(*events, last=len(self.ended) == len(self.answers))

    def close(self) -> None:
        """Tell the end of every answer: its own, or that it was cancelled or out of time."""
        ends = []
        for answer in self.answers:
            if answer.index in self.ended:
                continue
            if answer.ended_by is None and not self.ticket.is_cancelled:
                answer.ended_by = "time_limit"
            ends.append(answer.finish())
        self.ticket.push(*ends, last=True)

    def fail(self, error: Exception) -> None:
        """Tell that it failed."""
        self.ticket.push(error=error)


def _seeds(request: Request) -> list[int | None]:
    seeds = row_seeds(request.options, request.n)
    if request.options.seed is None:
        return seeds
    return [(request.options.seed + i) % 2**63 for i in range(request.n)]
