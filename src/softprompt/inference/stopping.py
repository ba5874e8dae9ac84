"""When an answer ends, and why.

A row ends at an end token, at a stop sequence, at the token limit or at the time limit.
The search runs on in the other rows, so what follows a row's end is padding: the end is
found again from the tokens alone, with the same rule that stopped the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria

from softprompt.inference.options import GenerationOptions

FinishReason = Literal["eos_token", "stop_sequence", "max_tokens", "time_limit"]
Decode = Callable[[Sequence[int]], str]

INCOMPLETE = "\ufffd"
"""What a decoder gives for the first bytes of a character."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Where and why an answer ended.

    Attributes:
        tokens: The answer's tokens up to its end, the end token or stop sequence included.
        text_end: Characters of the decoded tokens that are the answer; None is all of them.
        reason: What ended it.
    """

    tokens: tuple[int, ...]
    text_end: int | None
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class StopSequences:
    """Texts that end an answer once ``min_new_tokens`` tokens are there."""

    texts: tuple[str, ...]
    min_new_tokens: int
    decode: Decode

    def completed_by_last(self, tokens: Sequence[int]) -> int | None:
        """Return the character at which a stop sequence completed by the last token begins."""
        if not self.texts or not tokens:
            return None
        return self.completed(len(tokens), self.decode(tokens), self.decode(tokens[:-1]))

    def completed(self, count: int, text: str, before_last: str) -> int | None:
        """Return where a stop sequence begins that the last of ``count`` tokens completed.

        Args:
            count: Tokens of the answer.
            text: Their text.
            before_last: The text of all but the last of them.
        """
        if count < self.min_new_tokens:
            return None
        # The last token may complete a character that was decoded as a replacement before.
        before = len(before_last.rstrip(INCOMPLETE))
        starts = (text.find(stop, max(0, before - len(stop) + 1)) for stop in self.texts)
        return min((start for start in starts if start >= 0), default=None)

    def first(self, tokens: Sequence[int]) -> tuple[int, int] | None:
        """Return (tokens up to the first stop sequence, the character where it begins)."""
        text = self.decode(tokens)
        if not any(stop in text for stop in self.texts):
            return None
        for count in range(1, len(tokens) + 1):
            start = self.completed_by_last(tokens[:count])
            if start is not None:
                return count, start
        return None


class StopAtSequences(StoppingCriteria):
    """Ends a row when its answer completes a stop sequence."""

    def __init__(self, stops: StopSequences) -> None:
        self._stops = stops
        self._start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return ``[B]`` booleans, True where the row is done."""
        if self._start is None:
            # The first call comes after the first new token, whatever stands before it.
            self._start = input_ids.shape[1] - 1
        answers = input_ids[:, self._start :].tolist()
        done = [self._stops.completed_by_last(answer) is not None for answer in answers]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def find_ending(
    new_tokens: Sequence[int],
    eos_ids: frozenset[int],
    stops: StopSequences,
    options: GenerationOptions,
) -> Ending:
    """Return where an answer ended, from its row of new tokens with the padding behind it."""
    end = next((i for i, token in enumerate(new_tokens) if token in eos_ids), None)
    tokens = tuple(new_tokens if end is None else new_tokens[: end + 1])
    stopped = stops.first(tokens)
    if stopped is not None:
        return Ending(tokens[: stopped[0]], stopped[1], "stop_sequence")
    if end is not None:
        return Ending(tokens, None, "eos_token")
    timed_out = options.max_time is not None and len(tokens) < options.max_new_tokens
    return Ending(tokens, None, "time_limit" if timed_out else "max_tokens")
