"""A row of the decode forest: what it still has to run, and what its logits are for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from softprompt.engine import Lane, NewTokens, Wanted
from softprompt.errors import ServingError
from softprompt.generation.answer import Answer, Job
from softprompt.generation.request import Request
from softprompt.generation.residents import Key
from softprompt.generation.ticket import EchoEvent, TopLogProbs

_NO_TEXT = -1


@dataclass(frozen=True, slots=True)
class Prefill:
    """The ids of a request that are run before its first new token.

    Attributes:
        ids: Its ids, a prompt's from V on.
        followers: The input token that follows each id, -1 where another id does, or none.
        key: Under which key its prompt is kept, None when no other request can use it.
        kept_tokens: Tokens of the lane that a kept prompt fills.
        kept_ids: How many of ``ids`` they stand for; none when the prompt is keys and values.
    """

    ids: tuple[int, ...]
    followers: tuple[int, ...]
    key: Key | None = None
    kept_tokens: int = 0
    kept_ids: int = 0

    @classmethod
    def of(cls, request: Request, vocabulary: int) -> Prefill:
        """Return the ids of a request; ``vocabulary`` is V."""
        prompt, at = request.prompt, request.at
        text = list(enumerate(request.ids))
        if prompt is None:
            return cls(request.ids, _followers(text))
        if prompt.prefix is not None:
            return cls(request.ids, _followers(text), (prompt.key, ()), prompt.tokens, 0)
        virtual = [(_NO_TEXT, vocabulary + i) for i in range(prompt.input_tokens)]
        whole = [*text[:at], *virtual, *text[at:]]
        ids = tuple(token for _, token in whole)
        # Behind all of its input a prompt is this row's alone; tokens before it that are to be
        # scored must be run.
        if not virtual or at == len(text) or (request.echo and at):
            return cls(ids, _followers(whole))
        end = at + len(virtual)
        return cls(ids, _followers(whole), (prompt.key, request.ids[:at]), end, end)


def _followers(whole: list[tuple[int, int]]) -> tuple[int, ...]:
    """Return the input token behind each id; the first input token is never scored."""
    return (*(token if number > 0 else -1 for number, token in whole[1:]), -1)


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
        for logprob, top in scored(
            logits[torch.tensor(scorable, device=logits.device)], labels, count
        ):
            self.logprobs.append(logprob)
            self.top.append(top)

    def event(self, ids: tuple[int, ...]) -> EchoEvent:
        """Return all scores."""
        return EchoEvent(ids, tuple(self.logprobs[: len(ids)]), tuple(self.top[: len(ids)]))


@dataclass(slots=True, eq=False)
class ForestRow:
    """One row in the forest.

    Attributes:
        job: The request it belongs to.
        prefill: What it reads first.
        lane: Its slot in the cache.
        spare: While it reads, the slots of the request's other answers.
        done: How many ids it has read.
        keeps: Whether its prompt is to be kept once it was read.
        answer: Its answer, once its input was read.
        echo: The input's scores, where they are wanted.
    """

    job: Job
    prefill: Prefill
    lane: Lane
    spare: list[Lane]
    done: int = 0
    keeps: bool = False
    answer: Answer | None = None
    echo: Echo | None = None

    @property
    def is_reading(self) -> bool:
        """Whether some of its input was not read yet."""
        return self.done < len(self.prefill.ids)

    def next_tokens(self, budget: int) -> NewTokens:
        """Return what it runs next: its last token, or at most ``budget`` of its input."""
        if self.answer is not None:
            return NewTokens(self.lane, (self.answer.tokens[-1],))
        prompt = self.job.request.prompt
        ids = self.prefill.ids[self.done : self.done + budget]
        wanted: Wanted = "last" if self.done + len(ids) == len(self.prefill.ids) else "none"
        if self.echo is not None:
            wanted = "all"
        tokens = None if prompt is None or prompt.input is None else prompt.input.detach()
        return NewTokens(self.lane, ids, tokens, wanted)

    def read(self, count: int, logits: Tensor) -> None:
        """Note that ``count`` of its ids were read, and score the input by their logits."""
        if self.echo is not None:
            followers = self.prefill.followers[self.done : self.done + count]
            self.echo.add(logits, followers, self.job.request.logprobs or 0)
        self.done += count


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


def not_finite() -> ServingError:
    """Return the error of a request for which the model gives no numbers."""
    return ServingError("the model's output for this request is not finite; check its prompt")
