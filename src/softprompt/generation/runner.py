"""The interface of what runs requests over a base: admission, and one step at a time."""

from __future__ import annotations

from typing import Literal, Protocol

from softprompt.errors import ServingError
from softprompt.generation.answer import Job
from softprompt.generation.bounds import Bounds
from softprompt.generation.request import Request
from softprompt.generation.residents import ResidentPrompts

Admission = Literal["started", "no room", "later"]
"""Whether a job was started; "later" says that it waits for another, not for room."""


class Runner(Protocol):
    """Runs jobs; all but ``check`` is called by one thread."""

    name: str
    residents: ResidentPrompts

    @property
    def rows(self) -> int:
        """Answers that run."""
        ...

    @property
    def jobs(self) -> list[Job]:
        """The jobs that run."""
        ...

    @property
    def cached_tokens(self) -> int:
        """Tokens that there is memory for, whether or not rows use it now."""
        ...

    def check(self, request: Request) -> None:
        """Refuse a request that could never run."""
        ...

    def admit(self, job: Job) -> Admission:
        """Start a job if there is room."""
        ...

    def step(self) -> None:
        """Advance the jobs that run, and send their events."""
        ...


def beyond_bounds(request: Request, need: int, bounds: Bounds) -> ServingError:
    """Return the error of a request whose answers of ``need`` tokens each never fit into the bounds."""
    return ServingError(
        f"n = {request.n} of up to {need:,} tokens do not fit into max_batch_rows "
        f"{bounds.max_batch_rows} and max_cached_tokens {bounds.max_cached_tokens:,}; "
        "ask for less or raise the bounds"
    )
