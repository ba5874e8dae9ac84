"""Who computes: this process (``Batcher``, ``Scorer``), or servers behind it (``server/upstream``)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from softprompt.engine import EngineRow
    from softprompt.generation.batcher import BatcherStats
    from softprompt.generation.options import Bounds
    from softprompt.generation.request import Request
    from softprompt.generation.ticket import Ticket


class AnswerSource(Protocol):
    """Runs requests; any thread may call."""

    bounds: Bounds
    reason: str
    """What to know of the engine beside its name; empty where there is nothing."""

    @property
    def engine(self) -> str:
        """Name of what runs the requests."""

    @property
    def healthy(self) -> bool:
        """Whether requests have a chance to be answered."""

    @property
    def failure(self) -> Exception | None:
        """Why they have none."""

    @property
    def stats(self) -> BatcherStats:
        """The counters now."""

    def submit(self, request: Request) -> Ticket:
        """Take a request; raises SoftPromptError if it could never be run, or there is no room."""

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those that are here; False if that took too long."""

    def stop(self) -> None:
        """End; requests that are here end with the reason "cancelled"."""


class ScoreSource(Protocol):
    """Scores targets; any thread may call."""

    @property
    def healthy(self) -> bool:
        """Whether targets have a chance to be scored."""

    def submit(self, rows: Sequence[EngineRow]) -> Future[Tensor]:
        """Return what will be the log-probability of each row's target, float32 ``[N]`` in nats."""

    def stop(self) -> None:
        """End; what waits fails."""
