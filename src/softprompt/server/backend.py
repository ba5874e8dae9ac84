"""What the server needs of the thing that generates; ``Batcher`` is it, and tests have another."""

from __future__ import annotations

from typing import Protocol

from softprompt.inference import BatcherStats, Bounds, Ticket
from softprompt.inference.continuous.request import Request


class Backend(Protocol):
    """Answers many requests at once."""

    bounds: Bounds
    reason: str

    @property
    def engine(self) -> str:
        """What runs the requests."""
        ...

    @property
    def healthy(self) -> bool:
        """Whether it still does."""
        ...

    @property
    def failure(self) -> Exception | None:
        """What it stopped with, when that was an error."""
        ...

    @property
    def stats(self) -> BatcherStats:
        """What is being done now."""
        ...

    def submit(self, request: Request) -> Ticket:
        """Take a request in."""
        ...

    def drain(self, timeout: float | None = None) -> bool:
        """Finish what runs and take nothing in; False when time ran out."""
        ...

    def stop(self) -> None:
        """Drop everything."""
        ...
