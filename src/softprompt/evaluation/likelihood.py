"""Passes over tokenised rows, for evaluation and for validation during training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from softprompt.data import TokenRow
from softprompt.engine import Engine, EngineRow
from softprompt.generation import label_rows, per_token, rows_of_whole_inputs, score_rows
from softprompt.prompts import Prompt


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
    whole = [each for row in rows for each in label_rows(row.source, label_ids, prompt, row.at)]
    size = rows_of_whole_inputs(batch_size, len(label_ids))
    scores = score_rows(engine, whole, max_rows=size).view(len(rows), len(label_ids))
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
    whole = [EngineRow(row.source, row.target, prompt, row.at) for row in rows]
    total = float(score_rows(engine, whole, max_rows=batch_size).double().sum())
    return TargetLikelihood(total, sum(len(row.target) for row in rows))
