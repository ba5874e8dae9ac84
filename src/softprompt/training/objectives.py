"""What is minimised: the targets' negative log-likelihood, and what a method adds to it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, Self, TypeAlias, cast, final

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
        ...

    def __call__(self, rows: Sequence[EngineRow], tasks: Sequence[int]) -> BatchLoss:
        """Score the targets of a batch.

        Args:
            rows: The rows of one pass, those of one task with one prompt.
            tasks: The task of each row, ``[B]``.
        """
        ...


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

    def __call__(self, rows: Sequence[EngineRow], tasks: Sequence[int]) -> BatchLoss:
        """Score rows; see ``Objective``."""
        offered = min(len(self.labels), OFFERED_LABELS)  # of each row, its own first
        scores = self.engine.target_log_probs([each for row in rows for each in self._rows(row, offered)])
        sums = scores.row_sums(len(rows) * offered).view(-1, offered)
        choice = cross_entropy(sums, sums.new_zeros(len(rows), dtype=torch.long), reduction="none")
        own = scores.row_index % offered == 0
        return BatchLoss(scores.values[own], scores.row_index[own] // offered, self.weight * choice)

    @property
    def other_tokens(self) -> int:
        """Tokens that the other labels add to a row, at most."""
        return sum(sorted(map(len, self.labels))[1 - min(len(self.labels), OFFERED_LABELS) :])

    def _rows(self, row: EngineRow, offered: int) -> list[EngineRow]:
        """Return a row with its own label and with others; of many, some that the row alone decides."""
        others = [ids for ids in self.labels if ids != row.target]
        if len(others) >= offered:
            others = random.Random(repr(row.source)).sample(others, offered - 1)
        return [row, *(replace(row, target=ids) for ids in others)]


def likelihood_of(
    engine: Engine, labels: tuple[tuple[int, ...], ...] = (), weight: float | None = None
) -> Objective:
    """Return the loss of targets, of which all are labels if there are any; ``weight`` is that of their choice."""
    weight = CHOICE_WEIGHT if weight is None else weight
    return LabelChoice(engine, labels, weight) if len(labels) > 1 and weight else Likelihood(engine)


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
    """

    engine: Engine
    taught: Mapping[RowTokens, TopTargets]
    labels: Mapping[RowTokens, float]
    distractors: tuple[Tensor, ...] = ()
    joins: ClassVar[bool] = False

    def __call__(self, rows: Sequence[EngineRow], tasks: Sequence[int]) -> BatchLoss:
        """Score rows; see ``Objective``."""
        found = self.engine.predict(self._distracted(rows))
        keys = [(row.source, row.target) for row in rows]
        wanted = TopTargets.joined([self.taught[key] for key in keys])
        each = [self.labels.get(key, 0.0) for key in keys]
        with torch.set_grad_enabled(
            any(each) and torch.is_grad_enabled()
        ):  # without labels the likelihood is only reported
            scores = found.log_probs()
        weights = scores.values.new_tensor(each)[scores.row_index]
        divergence = wanted.divergence(found.logits[found.predictor])
        return BatchLoss(scores.values, scores.row_index, ((1 - weights) * divergence).sum(), weights)

    def _distracted(self, rows: Sequence[EngineRow]) -> Sequence[EngineRow]:
        """Return the rows of a batch with a distractor before their one prompt, or as they are."""
        draw, prompt = random.Random(repr([row.source for row in rows])), rows[0].prompt
        if not self.distractors or draw.random() < _UNDISTRACTED:
            return rows
        assert prompt is not None and prompt.prefix is not None
        both = Prompt(prefix=torch.cat([draw.choice(self.distractors).to(prompt.prefix), prompt.prefix], dim=3))
        return [replace(row, prompt=both) for row in rows]
