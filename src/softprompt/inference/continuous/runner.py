"""What runs the requests of a batcher."""

from __future__ import annotations

from typing import Literal, Protocol

from softprompt.inference.continuous.job import Job
from softprompt.inference.continuous.request import Request
from softprompt.inference.continuous.residents import ResidentPrompts

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
        """Advance the jobs that run, and tell what came of it."""
        ...
