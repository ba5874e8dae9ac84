"""What is minimised: the targets' negative log-likelihood, and what a method adds to it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, Self, cast, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, mse_loss

from softprompt.engine import Engine, EngineRow
from softprompt.prompts import ContextLabel, Prompt, PromptModule, check_task

CHOICE_WEIGHT = 1.0
"""Weight of the choice among labels: gains on most bases and data, up to 0.16 (docs/quality.md)."""

OFFERED_LABELS = 10
"""Labels that are scored for a row in training, its own among them, where there are more."""


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """The loss of one micro-batch, in parts.

    Attributes:
        values: log p of every target token, ``[M]``.
        row_index: The row each value belongs to, ``[M]``.
        penalty: What is added to the loss, summed over the target tokens: of each row ``[B]``, or of the batch
            ``[]``; None for nothing.
        weights: What each value counts in the loss, ``[M]``; None is one each.
    """

    values: Tensor
    row_index: Tensor
    penalty: Tensor | None = None
    weights: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """The sum that is minimised, in nats."""
        likelihood = -(self.values if self.weights is None else self.weights * self.values).sum()
        return likelihood if self.penalty is None else likelihood + self.penalty.sum()

    def is_finite(self) -> bool:
        """Return whether all of its numbers are."""
        sound = self.penalty is None or bool(torch.isfinite(self.penalty).all())
        return sound and bool(torch.isfinite(self.values).all())

    def divided(self, sizes: Sequence[int]) -> list[BatchLoss]:
        """Return the losses of parts of the batch, ``sizes`` rows each; a penalty of the batch has one part."""
        if len(sizes) == 1:
            return [self]
        owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(self.row_index.device)
        parts, first = [], 0
        for number, size in enumerate(sizes):
            own = owner[self.row_index] == number
            penalty = None if self.penalty is None else self.penalty[first : first + size]
            parts.append(BatchLoss(self.values[own], self.row_index[own] - first, penalty))
            first += size
        return parts


class Objective(Protocol):
    """The loss of a batch, differentiable in its rows' prompts."""

    @property
    def joins(self) -> bool:
        """Whether rows of several prompts may be in one pass, under equal objectives."""

    def __call__(self, rows: Sequence[EngineRow], tasks: Sequence[int]) -> BatchLoss:
        """Score the targets of a batch.

        Args:
            rows: The rows of one pass, those of one task with one prompt.
            tasks: The task of each row, ``[B]``.
        """


@final
@dataclass(frozen=True, slots=True)
class Likelihood:
    """Cross-entropy of the targets."""

    engine: Engine
    joins: ClassVar[bool] = True

    def __call__(self, rows: Sequence[EngineRow], tasks: Sequence[int]) -> BatchLoss:
        """Score rows; see ``Objective``."""
        scores = self.engine.target_log_probs(rows)
        return BatchLoss(scores.values, scores.row_index)


@final
@dataclass(frozen=True, slots=True)
class LabelChoice:
    """The likelihood of a row's label, and its choice: the cross-entropy of the labels' likelihoods over the set.

    The likelihood alone has a short run learn how labels are written before it learns which is right; the choice is
    what evaluation measures (as in Schick and Schütze 2021, arXiv:2001.07676). All labels of a row stand below
    it in the forest, so a label costs its own tokens alone. docs/quality.md has the gain.

    Attributes:
        engine: Runs the rows.
        labels: Token ids of each label.
        weight: Weight of the choice against the likelihood.
    """

    engine: Engine
    labels: tuple[tuple[int, ...], ...]
    weight: float
    joins: ClassVar[bool] = True

    @classmethod
    def of(cls, engine: Engine, labels: tuple[tuple[int, ...], ...], weight: float | None) -> Self | None:
        """Return the choice among labels at a weight, by default 1; None where there is none, or it is 0."""
        weight = CHOICE_WEIGHT if weight is None else weight
        return cls(engine, labels, weight) if len(labels) > 1 and weight else None

    def __call__(self, rows: Sequence[EngineRow], tasks: Sequence[int]) -> BatchLoss:
        """Score rows; see ``Objective``."""
        scores = self.engine.target_log_probs(self.offered(rows))
        sums = scores.row_sums(len(rows) * self.count).view(-1, self.count)
        choice = cross_entropy(sums, sums.new_zeros(len(rows), dtype=torch.long), reduction="none")
        own = scores.row_index % self.count == 0
        return BatchLoss(scores.values[own], scores.row_index[own] // self.count, self.weight * choice)

    @property
    def count(self) -> int:
        """Labels that a row is offered."""
        return min(len(self.labels), OFFERED_LABELS)

    @property
    def other_tokens(self) -> int:
        """Tokens that the other labels add to a row, at most."""
        return sum(sorted(map(len, self.labels))[1 - self.count :])

    def offered(self, rows: Sequence[EngineRow]) -> list[EngineRow]:
        """Return ``count`` rows for each: with its own label, then with others; of many, a draw of its own."""
        found = []
        for row in rows:
            others = [ids for ids in self.labels if ids != row.target]
            if len(others) >= self.count:
                others = random.Random(repr(row.source)).sample(others, self.count - 1)
            found += [row, *(replace(row, target=ids) for ids in others)]
        return found


def likelihood_of(
    engine: Engine, labels: tuple[tuple[int, ...], ...] = (), weight: float | None = None
) -> Objective:
    """Return the loss of targets, of which all are labels if there are any; ``weight`` is that of their choice."""
    return LabelChoice.of(engine, labels, weight) or Likelihood(engine)


@final
@dataclass(frozen=True, slots=True)
class ContextLikelihood:
    """Context-aware prompt tuning: cross-entropy of the targets and of the context's labels.

    PEFT scores the labels of the context in every row; here each is a row of its own behind the context
    before it, once for the batch, and weighs as many rows as there are. Labels do not move, so their
    tokens in such a row are those of the context (Blau et al. 2024, arXiv:2410.17222; ``cpt_loss``).

    Attributes:
        engine: Runs the rows.
        labels: The labels of the context.
    """

    engine: Engine
    labels: tuple[ContextLabel, ...]
    joins: ClassVar[bool] = False

    def __call__(self, rows: Sequence[EngineRow], tasks: Sequence[int]) -> BatchLoss:
        """Score rows; see ``Objective``."""
        context = rows[0].prompt
        assert context is not None and context.input is not None
        before = [EngineRow((), label.ids, Prompt(input=context.input[: label.start])) for label in self.labels]
        scores = self.engine.target_log_probs([*rows, *before])
        own = scores.row_index < len(rows)
        weights = [label.weight for label in self.labels]
        sums = scores.row_sums(len(rows) + len(before))[len(rows) :]  # of each label of the context
        penalty = -len(rows) * (sums * sums.new_tensor(weights)).sum()
        return BatchLoss(scores.values[own], scores.row_index[own], penalty)

    @property
    def tokens_per_row(self) -> int:
        """Tokens of the context's labels, by which the mean of the loss divides as well."""
        return sum(len(label.ids) for label in self.labels)


@final
class TeacherPrompts(PromptModule):
    """Several prompts that share nothing, under the interface of one with tasks."""

    def __init__(self, prompts: Sequence[PromptModule]) -> None:
        """Take over one prompt for each task."""
        super().__init__()
        self.prompts = nn.ModuleList(prompts)
        self.num_tasks = len(prompts)
        self.config = prompts[0].config

    def materialize(self, task: int = 0) -> Tensor:
        """Return the embeddings ``[S·P, H]`` of a task's own prompt; see ``PromptModule``."""
        check_task(task, self.num_tasks)
        return cast(PromptModule, self.prompts[task]).materialize()

    def stored(self) -> dict[str, Tensor]:
        """Return every parameter by its name; see ``PromptModule``."""
        return {name: value.detach().cpu().clone() for name, value in self.state_dict().items()}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``stored`` returned; see ``PromptModule``."""
        self.load_state_dict(dict(tensors))


@final
@dataclass(frozen=True, slots=True)
class Distillation:
    """The likelihood of the targets, and what a teacher prompt for each task would have answered.

    Attributes:
        engine: Runs rows; its ``target_outputs`` gives logits and hidden states.
        teachers: One prompt for each task, not trained any more.
        weight: How much the teachers count against the likelihood.
    """

    engine: Engine
    teachers: PromptModule
    weight: float
    joins: ClassVar[bool] = False

    def __call__(self, rows: Sequence[EngineRow], tasks: Sequence[int]) -> BatchLoss:
        """Score rows; see ``Objective``. All sums are over the target tokens of the rows."""
        student = self.engine.target_outputs(rows)
        with torch.no_grad():
            prompts = {task: self.teachers.prompt(task) for task in sorted(set(tasks))}
            taught = [replace(row, prompt=prompts[task]) for row, task in zip(rows, tasks, strict=True)]
            teacher = self.engine.target_outputs(taught)
        log_p = student.logits.float().log_softmax(dim=-1)  # [M, V]
        wanted = teacher.logits.float().log_softmax(dim=-1)
        divergence = kl_div(log_p, wanted, log_target=True, reduction="sum")
        distance = mse_loss(student.hidden.float(), teacher.hidden.float(), reduction="none")
        chosen = log_p.gather(1, student.labels[:, None])[:, 0]
        penalty = self.weight * (divergence + distance.mean(dim=-1).sum())
        return BatchLoss(chosen, student.row_index, penalty)
