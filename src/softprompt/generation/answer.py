"""One answer while it is generated: its next token, its text, and what ends it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Self, cast, final

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softprompt.backbone import Base
from softprompt.errors import ServingError
from softprompt.generation.forms import end_ids_of, form_of
from softprompt.generation.request import Decode, Request
from softprompt.generation.sampling import processors_of, seeds_of
from softprompt.generation.ticket import (
    REASONS,
    EchoEvent,
    Event,
    FinishEvent,
    FinishReason,
    Ticket,
    TokenEvent,
    TopLogProbs,
)

_INCOMPLETE = "\ufffd"
"""What a decoder gives for the first bytes of a character."""

_WINDOW = 24
"""Tokens that are decoded again with each new one, at least; enough for any character or joined word."""

Admission = Literal["started", "no room", "later"]
"""Whether a job was started; "later" says that it waits for another, not for room."""


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
        """Return where a stop sequence begins that the last of ``count`` tokens completed, by their texts."""
        if count < self.min_new_tokens:
            return None
        # The last token may complete a character that was decoded as a replacement before.
        before = len(before_last.rstrip(_INCOMPLETE))
        starts = (text.find(stop, max(0, before - len(stop) + 1)) for stop in self.texts)
        return min((start for start in starts if start >= 0), default=None)


@final
class GrowingText:
    """Incremental detokenizer: decodes an answer token by token, and gives its text out in whole characters.

    What may be the start of a stop sequence is held back until it is known not to be one. The
    pieces given out together are exactly the answer's text.
    """

    def __init__(self, decode: Decode, stops: StopSequences) -> None:
        self._decode = decode
        self._stops = stops
        self._text = ""
        self._given = 0
        self._start = 0  # first token of the window
        self._before = ""  # the text when the window was set
        self._overlap = ""  # what of it the window's tokens gave by themselves
        self._stop_start: int | None = None

    @property
    def answer(self) -> str:
        """The answer's text so far, without the stop sequence that ended it."""
        return self._text if self._stop_start is None else self._text[: self._stop_start]

    def add(self, tokens: Sequence[int]) -> bool:
        """Decode an answer that has one more token, and return whether a stop sequence ends it."""
        before, self._text = self._text, self._decoded(tokens)
        if self._stops.texts:
            self._stop_start = self._stops.completed(len(tokens), self._text, before)
        return self._stop_start is not None

    def settle(self, tokens: Sequence[int]) -> None:
        """Decode a finished answer whole."""
        self._text = self._decode(tokens)

    def _decoded(self, tokens: Sequence[int]) -> str:
        """Return the text of all tokens by decoding the last of them."""
        window = self._decode(tokens[self._start :])
        if not window.startswith(self._overlap):
            self._start, self._before, self._overlap = 0, "", ""
            return self._decode(tokens)
        text = self._before + window[len(self._overlap) :]
        if len(tokens) - self._start >= 2 * _WINDOW and not text.endswith(_INCOMPLETE):
            self._start = len(tokens) - _WINDOW
            self._before = self._decode(tokens)
            self._overlap = self._decode(tokens[self._start :])
            return self._before
        return text

    def new(self, *, ended: bool) -> str:
        """Return the text that was not given out yet and may be."""
        text = self.answer
        end = len(text) if ended else len(text.rstrip(_INCOMPLETE))
        if not ended:
            end -= self._may_be_stop(text[:end])
        piece = text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _may_be_stop(self, text: str) -> int:
        """Return how many characters at the end of a text may begin a stop sequence."""
        longest = max((len(stop) - 1 for stop in self._stops.texts), default=0)
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stops.texts):
                return count
        return 0


@dataclass(frozen=True, slots=True)
class AnswerRules:
    """What all answers over one base share: how they become text, and the tokens that end them.

    Attributes:
        decode: Token ids to text, where a request has no decoder of its own.
        eos_ids: Tokens that end an answer.
        counts_input: Whether the input's tokens count for the repetition penalty; an encoder's do not.
        offline: Whether answers are wanted at their end alone: no text while they grow, and a first
            token however late it is.
        tokenizer: The base's, which spells answers of a form.
    """

    decode: Decode
    eos_ids: frozenset[int]
    counts_input: bool
    offline: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def of(cls, base: Base, decode: Decode | None = None, *, offline: bool = False) -> Self:
        """Read them from a base; ``decode`` None is the tokenizer's, special tokens left out.

        Answers end at the tokenizer's end token, which prompts are trained to give, at the end of a turn in its
        chat template, and at those of the base's own generation settings.
        """
        tokenizer = base.tokenizer

        def text(ids: Sequence[int]) -> str:
            return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

        return cls(decode or text, end_ids_of(base), not base.is_encoder_decoder, offline, tokenizer)


@final
class Answer:
    """One of a request's answers; its time is over at ``deadline``, by ``time.monotonic``."""

    def __init__(self, request: Request, index: int, seed: int | None, rules: AnswerRules, deadline: float) -> None:
        self.request = request
        self.index = index
        self.seed = seed
        self.tokens: list[int] = []
        self.ended_by: FinishReason | None = None
        options = request.options
        decode = request.decode or rules.decode
        # Of a form its leading space is no part.
        self._decode = (lambda ids: decode(ids).removeprefix(" ")) if options.has_form else decode
        self._eos_ids = rules.eos_ids
        self._deadline = deadline
        self.stops = StopSequences(options.stop_sequences, options.min_new_tokens, self._decode)
        self._text = GrowingText(self._decode, self.stops)
        self._reads_text = not rules.offline or bool(options.stop_sequences)
        self._input = request.ids if rules.counts_input else ()
        skip = len(self._input)
        form = form_of(rules.tokenizer, rules.eos_ids, options, skip)
        self._processors = processors_of(options, seed, rules.eos_ids, skip, form)

    @property
    def is_plain(self) -> bool:
        """Whether the answer is greedy and unpenalised: its next token is the argmax of the logits."""
        least = self.request.options.min_new_tokens
        return not self._processors and (not self._eos_ids or len(self.tokens) >= least)

    def processed(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Return logits ``[b, V]`` after the options' processors, behind an answer's tokens ``[b, k]``."""
        scores = scores.clone()
        if tokens.shape[1] < self.request.options.min_new_tokens:
            scores[:, sorted(self._eos_ids)] = -math.inf
        if not self._processors:
            return scores
        before = torch.tensor(self._input, dtype=torch.long, device=tokens.device)
        ids = torch.cat([before.expand(len(tokens), -1), tokens], dim=1)
        return self._processors(cast(torch.LongTensor, ids), cast(torch.FloatTensor, scores))

    def choose(self, logits: Tensor) -> int:
        """Return the next token from logits ``[V]``, as ``generate`` would choose it."""
        tokens = torch.tensor([self.tokens], dtype=torch.long, device=logits.device)
        return int(self.processed(tokens, logits.unsqueeze(0)).argmax())

    def add(self, token: int, logprob: float | None = None, top: TopLogProbs = ()) -> list[Event]:
        """Append the next token; return its event, and the answer's end where it is the last."""
        self.tokens.append(token)
        if self._reads_text and self._text.add(self.tokens):
            self.ended_by = "stop_sequence"
        elif token in self._eos_ids:
            self.ended_by = "eos_token"
        elif len(self.tokens) >= self.request.options.max_new_tokens:
            self.ended_by = "max_tokens"
        elif time.monotonic() >= self._deadline:
            self.ended_by = "time_limit"
        piece = ""
        if self._reads_text:
            if self.ended_by is not None:
                self._text.settle(self.tokens)
            piece = self._text.new(ended=self.ended_by is not None)
        event = TokenEvent(self.index, token, piece, logprob, top)
        return [event] if self.ended_by is None else [event, self.finish()]

    def finish(self) -> FinishEvent:
        """Return the event of its end; an answer that did not end by itself was cancelled."""
        reason = self.ended_by
        if not self._reads_text:
            self._text.settle(self.tokens)
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


@dataclass(slots=True, eq=False)
class Job:
    """A request that a runner has taken: its answers, none of which is there when only its input is scored.

    Attributes:
        ticket: Where its events go.
        deadline: When its time is over, by ``time.monotonic``.
        least: Tokens that each answer gets however late it is.
        ended: Answers whose end was sent.
    """

    ticket: Ticket
    answers: list[Answer]
    deadline: float
    least: int = 0
    ended: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, ticket: Ticket, rules: AnswerRules) -> Job:
        """Prepare a request; its time starts now."""
        request = ticket.request
        limit = request.options.max_time
        deadline = math.inf if limit is None else time.monotonic() + limit
        answers = [
            Answer(request, i, seed, rules, deadline)
            for i, seed in enumerate(seeds_of(request.options, request.n))
            if request.generate
        ]
        return cls(ticket, answers, deadline, int(rules.offline))

    @property
    def request(self) -> Request:
        """The request."""
        return self.ticket.request

    @property
    def is_over(self) -> bool:
        """Whether it was cancelled or its time is over."""
        late = time.monotonic() >= self.deadline
        return self.ticket.is_cancelled or (
            late and all(len(answer.tokens) >= self.least for answer in self.answers)
        )

    def send(self, events: Sequence[Event]) -> None:
        """Send events to the ticket; the end of the last answer closes it."""
        self.ended |= {event.index for event in events if isinstance(event, FinishEvent)}
        self.ticket.push(*events, last=len(self.ended) == len(self.answers))

    def close(self) -> None:
        """End every answer that has not ended: cancelled, or out of time."""
        ends = []
        for answer in self.answers:
            if answer.index in self.ended:
                continue
            if answer.ended_by is None and not self.ticket.is_cancelled:
                answer.ended_by = "time_limit"
            ends.append(answer.finish())
        self.ticket.push(*ends, last=True)

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        self.ticket.push(error=error)


@dataclass(slots=True)
class Echo:
    """The scores of an input, gathered part by part."""

    logprobs: list[float | None] = field(default_factory=lambda: [None])
    top: list[TopLogProbs] = field(default_factory=lambda: [()])

    def add(self, logits: Tensor, followers: tuple[int, ...], count: int) -> None:
        """Score the input tokens that follow some ids by the logits ``[k, V]`` of those."""
        scorable = [i for i, token in enumerate(followers) if token >= 0]
        if not scorable:
            return
        labels = [followers[i] for i in scorable]
        for logprob, top in scored(logits[torch.tensor(scorable, device=logits.device)], labels, count):
            self.logprobs.append(logprob)
            self.top.append(top)

    def event(self, ids: tuple[int, ...]) -> EchoEvent:
        """Return all scores."""
        return EchoEvent(ids, tuple(self.logprobs[: len(ids)]), tuple(self.top[: len(ids)]))


def scored(logits: Tensor, labels: list[int], count: int) -> list[tuple[float, TopLogProbs]]:
    """Return log p of each label under its logits ``[k, V]``, and the ``count`` most likely tokens."""
    logs = logits.log_softmax(-1)
    own = logs.gather(1, torch.tensor(labels, device=logs.device).unsqueeze(1))[:, 0].tolist()
    if not count:
        return [(value, ()) for value in own]
    values, tokens = logs.topk(min(count, logs.shape[1]), dim=1)
    return [
        (value, tuple(zip(ids, tops, strict=True)))
        for value, ids, tops in zip(own, tokens.tolist(), values.tolist(), strict=True)
    ]


def model_failed(cause: Exception) -> ServingError:
    """Return the error of a request on which the model raised."""
    error = ServingError(f"the model failed on this request: {cause}")
    error.__cause__ = cause
    return error


def not_finite() -> ServingError:
    """Return the error of a request for which the model gives no numbers."""
    return ServingError("the model's output for this request is not finite; check its prompt")
