"""What an update lowers: the targets' negative log-probability, and what is added to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

from torch import Tensor

from softprompt.attach import USUAL, Places
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
    """Scores rows under prompts, differentiable in the prompts."""

    def __call__(
        self, rows: Sequence[EngineRow], prompts: Sequence[Tensor], tasks: Sequence[int]
    ) -> Scored:
        """Score rows whose ``prompt`` says which of ``prompts`` they stand behind.

        Args:
            rows: The rows of one pass; ``prompt`` is an index into ``prompts``.
            prompts: One value ``[S·P, H]`` for each task of the pass.
            tasks: The task of each value.
        """
        ...


@final
@dataclass(frozen=True, slots=True)
class Likelihood:
    """The plain objective: log-probabilities of the targets."""

    engine: Engine
    places: Places = USUAL

    def __call__(
        self, rows: Sequence[EngineRow], prompts: Sequence[Tensor], tasks: Sequence[int]
    ) -> Scored:
        """Score rows; see ``Objective``."""
        placed = [self.places.row(row, row.prompt) for row in rows]
        scores = self.engine.target_log_probs(placed, self.places.parts(prompts))
        return Scored(scores.values, scores.row_index)
