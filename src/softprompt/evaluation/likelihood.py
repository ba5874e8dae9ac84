"""Passes over tokenised rows, for evaluation and for validation during training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.data import TokenRow
from softprompt.engine import Engine, EngineRow
from softprompt.errors import ConfigError
from softprompt.inference import per_token, score_labels
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
    """Label scores of N rows.

    Attributes:
        scores: Log-probability of each label ``[N, K]``, nats, not normalised.
        label_tokens: Number of tokens of each label.
        predicted: Index of the best label of each row.
    """

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
    prompt: Prompt | None,
    rows: Sequence[TokenRow],
    label_ids: Sequence[Sequence[int]],
    *,
    batch_size: int = 64,
    normalize: bool = False,
) -> Classified:
    """Score every label for every row and take the best, without gradients.

    Args:
        engine: Scores targets after sources.
        prompt: The prompt; None is the base alone.
        rows: Tokenised rows; their targets are not looked at.
        label_ids: Tokens of the K labels.
        batch_size: (row, label) pairs in one pass, at most.
        normalize: Rank labels by their log-probability per token.
    """
    sources = [row.source for row in rows]
    scores = score_labels(
        engine,
        prompt,
        sources,
        label_ids,
        offsets=[row.at for row in rows],
        batch_size=batch_size,
    )
    lengths = tuple(len(ids) for ids in label_ids)
    ranked = per_token(scores, lengths) if normalize else scores
    return Classified(scores, lengths, tuple(ranked.argmax(dim=1).tolist()))


@torch.no_grad()
def target_likelihood(
    engine: Engine,
    prompt: Prompt | None,
    rows: Sequence[TokenRow],
    *,
    batch_size: int = 16,
) -> TargetLikelihood:
    """Return how likely the rows' targets are, without gradients.

    Args:
        engine: Scores targets after sources.
        prompt: The prompt; None is the base alone.
        rows: Tokenised rows, at least one.
        batch_size: Rows in one pass.

    Raises:
        ConfigError: ``batch_size`` is less than 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size expects at least 1 row, got {batch_size}")
    ordered = sorted(rows, key=lambda row: len(row.source) + len(row.target))
    total = 0.0
    for start in range(0, len(ordered), batch_size):
        batch = [
            EngineRow(row.source, row.target, prompt, row.at)
            for row in ordered[start : start + batch_size]
        ]
        total += float(engine.target_log_probs(batch).values.double().sum())
    return TargetLikelihood(total, sum(len(row.target) for row in rows))
