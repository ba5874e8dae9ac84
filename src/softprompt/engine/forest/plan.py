"""The plan of one pass: its tokens, each computed once, who sees whom, and what is predicted.

Causal rows, encoder rows and decoder rows are all run from such a plan; they differ in how it
is made (``causal_plan.py``, ``encoder_plan.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from softprompt.engine.forest.visibility import Span, Visibility, padded


@dataclass(frozen=True, slots=True)
class Targets:
    """The tokens to predict.

    Attributes:
        predictors: Stream index of the token before each target token, ``[M]``.
        labels: The target tokens, ``[M]``.
        row_index: The row each belongs to, ``[M]``.
    """

    predictors: Tensor
    labels: Tensor
    row_index: Tensor

    @classmethod
    def none(cls) -> Targets:
        """Return no targets."""
        nothing = torch.empty(0, dtype=torch.long)
        return cls(nothing, nothing, nothing)

    def places(self) -> tuple[Tensor, Tensor]:
        """Return each predicting token once ``[K]``, and which of them predicts each target ``[M]``."""
        wanted, place = torch.unique(self.predictors, return_inverse=True)
        return wanted, place


@dataclass(frozen=True, slots=True)
class Plan:
    """A stream of tokens to run.

    Attributes:
        ids: Token ids, from V on virtual, ``[N]``.
        positions: Position of each token in its own row, ``[N]``.
        kinds: Who sees whom: bundles of queries with their keys, kinds of unlike shape apart.
        targets: What is predicted.
        tree: For a forest, where each token stands in depth-first order and where its descendants
            end, ``[2, N]``.
    """

    ids: Tensor
    positions: Tensor
    kinds: tuple[tuple[Span, ...], ...]
    targets: Targets = field(default_factory=Targets.none)
    tree: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def visibility(self) -> Visibility:
        """Return who sees whom within the stream."""
        return replace(padded(self.kinds, self.positions, self.positions), tree=self.tree)

    def visibility_over(self, other: Plan, owned: Sequence[Tensor]) -> Visibility:
        """Return who sees which token of another stream (cross-attention).

        Args:
            other: The other stream.
            owned: Tokens of the other stream that each owner's tokens see.
        """
        spans = [
            Span(span.queries, owned[span.owner], _all(len(span.queries), len(owned[span.owner])))
            for kind in self.kinds
            for span in kind
        ]
        return padded([spans], self.positions, other.positions)


def _all(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool)
