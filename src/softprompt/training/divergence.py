"""What a teacher predicts for target tokens, and a student's divergence from it: the loss of a distillation."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self, TypeAlias, final

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from softprompt.engine import Engine, EngineRow
from softprompt.prompts import Prompt
from softprompt.training.objectives import BatchLoss, LabelChoice

_NOTHING = -1e4
"""Log of a mass that float32 cannot tell from zero; minus infinity would make a product with zero undefined."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class TopTargets:
    """What a teacher predicts for M target tokens: its k most likely tokens, and the mass of all others.

    Attributes:
        ids: The teacher's most likely tokens, ``[M, k]``.
        log_probs: Their log-probabilities, float32 ``[M, k]``.
        tail: Log of the mass of all other tokens together, float32 ``[M]``.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int) -> Self:
        """Keep the k largest of logits ``[M, V]``, all of them where V is smaller; on the CPU."""
        logits = logits.detach().float()
        _, ids = logits.topk(min(k, logits.shape[1]))
        log_probs, tail = _of_classes(logits, ids)
        return cls(ids.to("cpu", torch.int32), log_probs.cpu(), tail.cpu())

    @classmethod
    def joined(cls, parts: Sequence[TopTargets]) -> Self:
        """Return those of several rows, one behind the other."""
        return cls(*(torch.cat([getattr(each, name) for each in parts]) for name in ("ids", "log_probs", "tail")))

    def part(self, start: int, end: int) -> TopTargets:
        """Return those of the target tokens from ``start`` to ``end``."""
        return TopTargets(self.ids[start:end], self.log_probs[start:end], self.tail[start:end])

    def __len__(self) -> int:
        return len(self.tail)

    def divergence(self, logits: Tensor) -> Tensor:
        """Return KL(teacher || student) in nats for each token, ``[M]``, of a student's logits ``[M, V]``.

        The k tokens are a class each, and all others together one more, so it is at most the divergence over the
        whole vocabulary, and equal to it where k is V (Eyuboglu et al. 2025, arXiv:2506.06266, without the tail).
        """
        ids = self.ids.to(logits.device, torch.long)
        chosen, rest = _of_classes(logits.float(), ids)
        student = torch.cat([chosen, rest[:, None]], dim=1)
        teacher = torch.cat([self.log_probs, self.tail[:, None]], dim=1).to(logits.device)
        return kl_div(student, teacher, log_target=True, reduction="none").sum(dim=1)

    def agreement(self, logits: Tensor) -> Tensor:
        """Return whether a student's most likely token is the teacher's, for each token, ``[M]``."""
        return logits.argmax(dim=1) == self.ids[:, 0].to(logits.device)


def _of_classes(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of some tokens ``[M, k]`` and of all others together ``[M]``."""
    whole = logits.logsumexp(dim=1)
    chosen = logits.gather(1, ids) - whole[:, None]
    if ids.shape[1] == logits.shape[1]:
        return chosen, torch.full_like(whole, _NOTHING)
    # 1 minus the others' sum would lose a small tail to rounding.
    rest = logits.scatter(1, ids, -torch.inf).logsumexp(dim=1) - whole
    return chosen, rest.clamp(min=_NOTHING)


RowTokens: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Source and target of a row."""


_UNDISTRACTED = 0.5
"""Share of the batches without a distractor."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class TopDivergence:
    """The divergence from what a teacher predicted for each target token, mixed with the likelihood of labels.

    A row is known by its tokens: the student sees nothing else of it, so two rows of the same tokens could not be
    taught different answers.

    Attributes:
        engine: Runs rows.
        taught: What the teacher predicted for each row.
        labels: The weight w of the likelihood in rows whose target is a label: their loss is
            (1 - w) KL - w log p; rows that are not named have w = 0.
        distractors: Keys and values ``[L, 2, A_kv, P, D]`` of other prompts; one of them stands before the
            trained one in every second batch (arXiv:2606.04557), drawn by the batch's content.
        choice: The choice among labels, where the targets are some; adds KL(teacher || student) over those that
            a row is offered, times its weight.
        chosen: What the teacher gives each of the choice's labels, in nats, for each row.
    """

    engine: Engine
    taught: Mapping[RowTokens, TopTargets]
    labels: Mapping[RowTokens, float]
    distractors: tuple[Tensor, ...] = ()
    choice: LabelChoice | None = None
    chosen: Mapping[RowTokens, Sequence[float]] = field(default_factory=dict)
    joins: ClassVar[bool] = False

    def __call__(self, rows: Sequence[EngineRow], tasks: Sequence[int]) -> BatchLoss:
        """Score rows; see ``Objective``."""
        rows, count = self._distracted(rows), 1
        if self.choice is not None:
            rows, count = self.choice.offered(rows), self.choice.count
        found = self.engine.predict(rows)
        keys = [(row.source, row.target) for row in rows[::count]]
        given = [self.labels.get(key, 0.0) for key in keys]
        differentiable = self.choice is not None or any(given)  # else the likelihood is only reported
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            scores = found.log_probs()
        own = scores.row_index % count == 0
        index = scores.row_index[own] // count
        weights = scores.values.new_tensor(given)
        wanted = TopTargets.joined([self.taught[key] for key in keys])
        penalty = ((1 - weights)[index] * wanted.divergence(found.logits[found.predictor[own]])).sum()
        if self.choice is not None:
            sums = scores.row_sums(len(rows)).view(-1, count)
            penalty = penalty + self.choice.weight * self._choices(sums, rows, weights)
        return BatchLoss(scores.values[own], index, penalty, weights[index])

    def _choices(self, sums: Tensor, rows: Sequence[EngineRow], weights: Tensor) -> Tensor:
        """Return the divergence of all rows' choices, each of as many labels as ``sums``; given ones count w."""
        assert self.choice is not None
        numbers = {ids: number for number, ids in enumerate(self.choice.labels)}
        firsts = [row for row in rows[:: sums.shape[1]] for _ in range(sums.shape[1])]
        pairs = zip(firsts, rows, strict=True)
        scores = [self.chosen[first.source, first.target][numbers[row.target]] for first, row in pairs]
        wanted = sums.new_tensor(scores).view_as(sums).softmax(dim=1) * (1 - weights)[:, None]
        wanted[:, 0] += weights
        return kl_div(sums.log_softmax(dim=1), wanted, reduction="sum")

    @property
    def other_tokens(self) -> int:
        """Tokens that the other labels of a choice add to a row, at most."""
        return 0 if self.choice is None else self.choice.other_tokens

    def _distracted(self, rows: Sequence[EngineRow]) -> Sequence[EngineRow]:
        """Return the rows of a batch with a distractor before their one prompt, or as they are."""
        draw, prompt = random.Random(repr([row.source for row in rows])), rows[0].prompt
        if not self.distractors or draw.random() < _UNDISTRACTED:
            return rows
        assert prompt is not None and prompt.prefix is not None
        both = Prompt(prefix=torch.cat([draw.choice(self.distractors).to(prompt.prefix), prompt.prefix], dim=3))
        return [replace(row, prompt=both) for row in rows]
