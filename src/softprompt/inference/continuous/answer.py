"""One answer while it grows: which token comes next, what is told of it, and when it ends."""

from __future__ import annotations

import math
import time
from typing import cast, final

import torch
from torch import Tensor

from softprompt.inference.continuous.events import REASONS, FinishEvent, TokenEvent, TopLogProbs
from softprompt.inference.continuous.request import Request
from softprompt.inference.continuous.text import GrowingText
from softprompt.inference.sampling import row_processors
from softprompt.inference.stopping import Decode, FinishReason, StopSequences


@final
class Answer:
    """One of a request's answers.

    Args:
        request: The request.
        index: Which of its answers.
        seed: What it draws with; None when it draws nothing.
        decode: Token ids to text.
        eos_ids: Tokens that end it.
        penalised: Input tokens that a repetition penalty counts.
        deadline: When its time is over, by ``time.monotonic``.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        seed: int | None,
        decode: Decode,
        eos_ids: frozenset[int],
        penalised: tuple[int, ...],
        deadline: float,
    ) -> None:
        self.request = request
        self.index = index
        self.seed = seed
        self.tokens: list[int] = []
        self.ended_by: FinishReason | None = None
        self._decode = decode
        self._eos_ids = eos_ids
        self._deadline = deadline
        options = request.options
        stops = StopSequences(options.stop_sequences, options.min_new_tokens, decode)
        self._text = GrowingText(decode, stops)
        self._processors = row_processors(options, [penalised], [seed], eos_ids)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token comes next, whatever came before."""
        return not self._processors and not self._ends_are_barred

    @property
    def _ends_are_barred(self) -> bool:
        return bool(self._eos_ids) and len(self.tokens) < self.request.options.min_new_tokens

    def choose(self, logits: Tensor) -> int:
        """Return the token that comes next, as ``generate`` would choose it from logits ``[V]``."""
        scores = logits.unsqueeze(0).clone()
        if self._ends_are_barred:
            scores[:, sorted(self._eos_ids)] = -math.inf
        tokens = torch.tensor([self.tokens], dtype=torch.long, device=scores.device)
        return int(self._processors(cast(torch.LongTensor, tokens), scores).argmax())

    def add(self, token: int, logprob: float | None, top: TopLogProbs) -> TokenEvent:
        """Take the next token, and tell of it."""
        self.tokens.append(token)
        stopped = self._text.add(self.tokens)
        if stopped:
            self.ended_by = "stop_sequence"
        elif token in self._eos_ids:
            self.ended_by = "eos_token"
        elif len(self.tokens) >= self.request.options.max_new_tokens:
            self.ended_by = "max_tokens"
        elif time.monotonic() >= self._deadline:
            self.ended_by = "time_limit"
        if self.ended_by is not None:
            self._text.settle(self.tokens)
        piece = self._text.new(ended=self.ended_by is not None)
        return TokenEvent(self.index, token, piece, logprob, top)

    def finish(self) -> FinishEvent:
        """Tell of its end; one that did not end by itself was cancelled."""
        reason = self.ended_by
        return FinishEvent(
            index=self.index,
            reason="cancelled" if reason is None else REASONS[reason],
            text=self._whole_text(),
            tokens=tuple(self.tokens),
            prompt_tokens=self.request.virtual_tokens,
            input_tokens=len(self.request.ids),
            seed=self.seed,
            ended_by=reason,
        )

    def _whole_text(self) -> str:
        kept = self._text.answer
        if not self.request.options.preserve_input_text:
            return kept
        # Decoding both together keeps the space between input and answer.
        both = self._decode([*self.request.ids, *self.tokens])
        return both.removesuffix(self._decode(self.tokens)) + kept
