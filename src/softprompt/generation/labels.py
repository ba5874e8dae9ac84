"""Labels scored, and targets weighed, by how likely the model finds them as the answer.

score(x, k) = sum over the tokens of label k of log p(token | prompt, x, tokens before),
the label's tokens ending with the end token where the tokenizer has one. Normalised, the
sum is divided by the label's token count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softprompt.engine import Engine, EngineRow
from softprompt.errors import ConfigError
from softprompt.generation.scorer import score_rows

if TYPE_CHECKING:
    from softprompt.data import RowTokenizer, TokenRow
    from softprompt.generation.request import Input
    from softprompt.prompts import Prompt


@dataclass(frozen=True, slots=True)
class LabelScores:
    """How likely each label is as the answer to one input.

    Attributes:
        label: The best label.
        scores: Log-probability of each label (per token when normalised), nats.
        probabilities: Softmax of the scores over the label set.
        input_cut: Whether the input was longer than the prompt's limit and lost its end.
    """

    label: str
    scores: Mapping[str, float]
    probabilities: Mapping[str, float]
    input_cut: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def label_set(given: Sequence[str] | None, own: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the labels to score: those that are given, or a prompt's own.

    Raises:
        ConfigError: One text is given, whose characters would be the labels.
    """
    if isinstance(given, str):
        raise ConfigError(f"labels expects a list of texts, got the text {given!r}; put it in a list")
    chosen = own if given is None else given
    return None if chosen is None else tuple(chosen)


def label_ids_of(rows: RowTokenizer, labels: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the tokens of each label as an answer.

    Raises:
        ConfigError: There is no label, a label has no token, or two have the same tokens.
        DataError: A label is longer than answers may be.
    """
    found = [rows.label(label) for label in labels]
    check_label_ids(labels, found)
    return found


def label_scores(
    labels: Sequence[str],
    scores: Tensor,
    cut: Sequence[bool],
    *,
    shares: Tensor | None = None,
    best: Sequence[int] | None = None,
) -> list[LabelScores]:
    """Return what scores ``[N, K]`` of K labels say of N inputs, and whether each lost its end.

    Without ``shares`` ``[N, K]`` they are the softmax of the scores; without the ``best`` label of each
    input it is the one of the highest score.
    """
    shares = torch.softmax(scores, dim=1) if shares is None else shares
    best = scores.argmax(dim=1).tolist() if best is None else best
    return [
        LabelScores(
            label=labels[index],
            scores=dict(zip(labels, row, strict=True)),
            probabilities=dict(zip(labels, share, strict=True)),
            input_cut=was_cut,
        )
        for index, row, share, was_cut in zip(best, scores.tolist(), shares.tolist(), cut, strict=True)
    ]


def check_label_ids(labels: Sequence[str], label_ids: Sequence[Sequence[int]]) -> None:
    """Raise ``ConfigError`` where there is no label, one has no token, or two have the same tokens."""
    if not labels:
        raise ConfigError("scoring expects at least one label, got none; pass labels")
    seen: dict[tuple[int, ...], str] = {}
    for label, ids in zip(labels, label_ids, strict=True):
        if not ids:
            raise ConfigError(f"the label {label!r} has no tokens; give it another name")
        if tuple(ids) in seen:
            raise ConfigError(
                f"the labels {seen[tuple(ids)]!r} and {label!r} have the same tokens under this "
                "tokenizer; rename or drop one of them"
            )
        seen[tuple(ids)] = label


@dataclass(frozen=True, slots=True)
class Labelling:
    """N inputs of one prompt, and the K labels to score: their batch rows, and scores from the rows' sums."""

    labels: Sequence[str]
    label_ids: Sequence[tuple[int, ...]]
    inputs: Sequence[Input]

    def rows(self, prompt: Prompt | None) -> list[EngineRow]:
        """Return a batch row for each label of each input behind a prompt, input by input."""
        return [row for each in self.inputs for row in label_rows(each.ids, self.label_ids, prompt, each.at)]

    def answers(self, sums: Tensor, *, normalize: bool) -> list[LabelScores]:
        """Return what the rows' log-probabilities ``[N·K]`` say; normalised they are per token."""
        scores = sums.view(len(self.inputs), len(self.labels))
        if normalize:
            scores = per_token(scores, [len(ids) for ids in self.label_ids])
        return label_scores(self.labels, scores, [each.cut for each in self.inputs])


def label_rows(
    source: Sequence[int], label_ids: Sequence[Sequence[int]], prompt: Prompt | None, at: int = 0
) -> list[EngineRow]:
    """Return one batch row for each of an input's K labels, whose prompt stands behind ``at`` source tokens."""
    return [EngineRow(tuple(source), tuple(label), prompt, at) for label in label_ids]


def rows_of_whole_inputs(batch_size: int, labels: int) -> int:
    """Return how many rows a pass of about ``batch_size`` takes, so that no input's labels are parted.

    Raises:
        ConfigError: ``batch_size`` is less than 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size expects at least 1 row, got {batch_size}")
    return max(1, batch_size // max(1, labels)) * max(1, labels)


def per_token(scores: Tensor, label_tokens: Sequence[int]) -> Tensor:
    """Return scores ``[N, K]`` divided by each label's number of tokens."""
    return scores / torch.tensor(label_tokens, dtype=scores.dtype)


@dataclass(frozen=True, slots=True)
class TargetLikelihood:
    """How likely the targets of some rows are.

    Attributes:
        log_prob: Sum of the log-probabilities of the target tokens, nats.
        tokens: Number of these tokens, end tokens included.
    """

    log_prob: float
    tokens: int

    @property
    def loss(self) -> float:
        """Mean negative log-probability of a target token, nats."""
        return -self.log_prob / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite when that exceeds the range of a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True, slots=True)
class Classified:
    """Log-probabilities of K labels ``[N, K]``, nats, not normalised, their tokens, and each row's best label."""

    scores: Tensor
    label_tokens: tuple[int, ...]
    predicted: tuple[int, ...]

    def likelihood(self, gold: Sequence[int | None]) -> TargetLikelihood:
        """Return how likely the gold labels are; rows whose gold label is None do not count."""
        picked = [(row, label) for row, label in enumerate(gold) if label is not None]
        return TargetLikelihood(
            log_prob=math.fsum(float(self.scores[row, label]) for row, label in picked),
            tokens=sum(self.label_tokens[label] for _, label in picked),
        )


def classify_rows(
    engine: Engine,
    rows: Sequence[TokenRow],
    label_ids: Sequence[Sequence[int]],
    prompt: Prompt | None,
    *,
    batch_size: int = 64,
    normalize: bool = False,
) -> Classified:
    """Score each of K labels for every row and take the best, without gradients; ``normalize`` is per token.

    The rows' targets are not used; ``batch_size`` (row, label) pairs go into one pass, at most.

    Raises:
        ConfigError: ``batch_size`` is less than 1.
    """
    size = rows_of_whole_inputs(batch_size, len(label_ids))

    def scored(own: Sequence[TokenRow]) -> Sequence[Tensor]:
        whole = [each for row in own for each in label_rows(row.source, label_ids, prompt, row.at)]
        return tuple(score_rows(engine, whole, max_rows=size).view(len(own), len(label_ids)))

    scores = torch.stack(engine.processes.split(rows, scored))
    lengths = tuple(len(ids) for ids in label_ids)
    ranked = per_token(scores, lengths) if normalize else scores
    return Classified(scores, lengths, tuple(ranked.argmax(dim=1).tolist()))


def target_likelihood(
    engine: Engine, rows: Sequence[TokenRow], prompt: Prompt | None, *, batch_size: int = 16
) -> TargetLikelihood:
    """Return how likely the targets of at least one row are, without gradients; a prompt of None is the base.

    Raises:
        ConfigError: ``batch_size``, the rows in one pass, is less than 1.
    """

    def scored(own: Sequence[TokenRow]) -> Sequence[float]:
        whole = [EngineRow(row.source, row.target, prompt, row.at, row.unscored) for row in own]
        found: list[float] = score_rows(engine, whole, max_rows=batch_size).tolist()
        return found

    total = math.fsum(engine.processes.split(rows, scored))
    return TargetLikelihood(total, sum(row.scored for row in rows))
