"""A request to the batcher: an input, its prompt, and what is wanted of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from softprompt.errors import ConfigError, DataError
from softprompt.inference.options import GenerationOptions
from softprompt.inference.requests import Input
from softprompt.prompts import Prompt

Decode = Callable[[Sequence[int]], str]

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Request:
    """One input and what is wanted of it.

    Attributes:
        ids: Token ids of the input.
        prompt: The prompt; None is the base model alone. A request keeps the one it began with.
        at: Input tokens before the prompt.
        options: How to generate. ``max_time`` counts from submission; with n > 1 answer i draws with
            ``seed + i``.
        n: Answers.
        logprobs: Likeliest tokens to name with each token's log-probability; None wants none of it.
        echo: Whether the input's own log-probabilities are wanted, as an ``EchoEvent``.
        generate: Whether answers are wanted; without them only the input is scored.
        decode: Token ids to text; None is the batcher's own.
    """

    ids: tuple[int, ...]
    prompt: Prompt | None = None
    at: int = 0
    options: GenerationOptions = field(default_factory=GenerationOptions)
    n: int = 1
    logprobs: int | None = None
    echo: bool = False
    generate: bool = True
    decode: Decode | None = None

    def __post_init__(self) -> None:
        """Check what needs no model.

        Raises:
            ConfigError: A value is out of range, or neither an answer nor scores are wanted.
            DataError: A token id is negative.
        """
        if self.n < 1:
            raise ConfigError(f"n expects at least 1 answer, got {self.n}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise ConfigError(
                f"logprobs expects 0 to {MAX_TOP_LOGPROBS} likeliest tokens, got {self.logprobs}"
            )
        if min(self.ids, default=0) < 0:
            raise DataError(
                f"token ids are at least 0, got {min(self.ids)}; use the tokenizer that belongs to the model"
            )
        if not self.generate and not self.echo:
            raise ConfigError(
                "the request wants neither an answer nor its input's scores; ask for one"
            )

    @property
    def new_tokens(self) -> int:
        """Most new tokens of one answer."""
        return self.options.max_new_tokens if self.generate else 0

    @property
    def virtual_tokens(self) -> int:
        """Virtual tokens of its prompt."""
        return 0 if self.prompt is None else self.prompt.tokens


def request_of(given: Input, prompt: Prompt | None, **settings: Any) -> Request:
    """Return a request for the answer of a prompt to an input; settings are its other fields."""
    return Request(given.ids, prompt, given.at, decode=given.decode, **settings)
