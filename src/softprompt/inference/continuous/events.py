"""What a batcher tells about a request while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from softprompt.inference.stopping import FinishReason

Reason = Literal["stop", "length", "time", "cancelled"]

TopLogProbs = tuple[tuple[int, float], ...]
"""The likeliest tokens and their log-probabilities, likeliest first."""

REASONS: dict[FinishReason, Reason] = {
    "eos_token": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "time_limit": "time",
}


@dataclass(frozen=True, slots=True)
class EchoEvent:
    """The input's own log-probabilities, before any sampling setting; sent once, before tokens.

    Attributes:
        token_ids: The input's tokens.
        logprobs: log p of each behind what stands before it; None for the first.
        top_logprobs: The likeliest tokens in the place of each; empty for the first.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    top_logprobs: tuple[TopLogProbs, ...]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token.

    Attributes:
        index: Which of the request's answers it belongs to.
        token_id: The token.
        text: What it adds to the answer's text. Characters come whole, and what may be the start of a
            stop sequence waits, so this may be empty or more than the token; together with the other
            events of the answer it is exactly the answer.
        logprob: log p of the token, before any sampling setting; None when not asked for.
        top_logprobs: The likeliest tokens in its place.
    """

    index: int
    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: TopLogProbs = ()


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The end of one answer.

    Attributes:
        index: Which of the request's answers ended.
        reason: "stop", "length", "time" or "cancelled".
        text: The whole answer, as ``Generation.text``.
        tokens: Its tokens, the end token or stop sequence included.
        prompt_tokens: Virtual tokens of its prompt.
        input_tokens: Text tokens of its input.
        seed: The seed that repeats it; None when nothing was drawn.
        ended_by: As ``Generation.finish_reason``; None when cancelled.
    """

    index: int
    reason: Reason
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    input_tokens: int
    seed: int | None = None
    ended_by: FinishReason | None = None


Event = EchoEvent | TokenEvent | FinishEvent
