"""What the server asks of the thing that generates: requests, tickets and their events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from softprompt.engine.prefixes import virtual_length
from softprompt.errors import SoftPromptError
from softprompt.inference.options import GenerationOptions

Reason = Literal["stop", "length", "time", "cancelled"]
TopLogProbs = tuple[tuple[int, float], ...]


class NotServingError(SoftPromptError):
    """Serving has stopped, is stopping, or has failed."""


class QueueFullError(SoftPromptError):
    """Too many requests wait; ``retry_after`` seconds is when to come again."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class PromptValue:
    """A prompt by its content: ``key`` is the same for the same ``value``."""

    key: str
    value: Tensor | None
    decoder: Tensor | None = None
    sees_input: bool = True

    @property
    def tokens(self) -> int:
        """Virtual tokens, in all places."""
        parts = [part for part in (self.value, self.decoder) if part is not None]
        return sum(virtual_length(part) for part in parts)


@dataclass(frozen=True, slots=True)
class Request:
    """One input to be answered ``n`` times."""

    ids: tuple[int, ...]
    prompt: PromptValue | None = None
    at: int = 0
    options: GenerationOptions = field(default_factory=GenerationOptions)
    n: int = 1
    logprobs: int | None = None
    echo: bool = False
    generate: bool = True
    decode: Callable[[Sequence[int]], str] | None = None


@dataclass(frozen=True, slots=True)
class EchoEvent:
    """Log-probabilities of the input's tokens, for echo; None for what nothing precedes."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    top_logprobs: tuple[TopLogProbs, ...]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A token of one answer; ``text`` is what it adds, held back while it may begin a stop."""

    index: int
    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: TopLogProbs = ()


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The end of one answer; ``text`` is the whole answer."""

    index: int
    reason: Reason
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    input_tokens: int
    seed: int | None = None


Event = EchoEvent | TokenEvent | FinishEvent


class Ticket(Protocol):
    """A request on its way."""

    def __aiter__(self) -> AsyncIterator[Event]:
        """Return its events; they end with the last answer's, or with the error that ended it."""
        ...

    def cancel(self) -> None:
        """Stop working on it."""
        ...


class Batcher(Protocol):
    """Answers many requests at once."""

    name: str
    reason: str

    @property
    def healthy(self) -> bool: ...  # noqa: D102
    @property
    def running(self) -> int: ...  # noqa: D102
    @property
    def waiting(self) -> int: ...  # noqa: D102
    @property
    def cache_usage(self) -> float: ...  # noqa: D102

    def submit(self, request: Request) -> Ticket:
        """Take a request in.

        Raises:
            QueueFullError: Too many wait.
            ContextOverflowError: It can never fit.
        """
        ...

    def drain(self, timeout: float) -> bool:
        """Finish what runs and take nothing in; False when time ran out."""
        ...

    def stop(self) -> None:
        """Drop everything."""
        ...
