"""The training loss: the targets' negative log-likelihood, and what is added to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

from torch import Tensor

from softprompt.engine import Engine, EngineRow


@dataclass(frozen=True, slots=True)
class Scored:
    """One pass over some rows.

    Attributes:
        values: log p of every target token, ``[M]``.
        row_index: The row each value belongs to, ``[M]``.
        penalty: What is added to the loss, summed over the target tokens; None for nothing.
    """

    values: Tensor
    row_index: Tensor
    penalty: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """The sum that is lowered, in nats."""
        likelihood = -self.values.sum()
        return likelihood if self.penalty is None else likelihood + self.penalty


class Objective(Protocol):
    """The loss of a batch, differentiable in its rows' prompts."""

    def __call__(self, rows: Sequence[EngineRow], tasks: Sequence[int]) -> Scored:
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

    def __call__(self, rows: Sequence[EngineRow], tasks: Sequence[int]) -> Scored:
        """Score rows; see ``Objective``."""
        scores = self.engine.target_log_probs(rows)
        return Scored(scores.values, scores.row_index)
