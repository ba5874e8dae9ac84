"""Where a run is: the one value that, with the settings, decides how it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class Sums:
    """What one update adds up: losses in nats, target tokens, and all tokens."""

    targets: int
    tokens: int
    loss: float = 0.0
    penalty: float = 0.0


@dataclass
class RunState:
    """Position, counts and best result of a run, always at the border between two updates.

    ``epoch`` counts finished epochs, ``group`` the updates done in the current one, ``update`` all
    updates. Nothing random is kept: the order of the rows follows from (seed, epoch), dropout
    from (seed, update).
    """

    epoch: int = 0
    group: int = 0
    update: int = 0
    epoch_loss: float = 0.0  # sum over target tokens of the current epoch
    epoch_penalty: float = 0.0  # likewise, what distillation adds
    epoch_targets: int = 0
    learning_rate: float = 0.0  # of the last update
    tokens: int = 0
    seconds: float = 0.0
    stale_epochs: int = 0
    best_epoch: int = 0
    best_quality: list[float] | None = None
    best: dict[str, Tensor] | None = None  # the prompt's parameters
    history: list[dict[str, Any]] = field(default_factory=list)

    def add_update(self, sums: Sums, *, seconds: float, rate: float) -> None:
        """Count one finished update: its sums, its seconds, its learning rate."""
        self.learning_rate = rate
        self.group += 1
        self.update += 1
        self.epoch_loss += sums.loss
        self.epoch_penalty += sums.penalty
        self.epoch_targets += sums.targets
        self.tokens += sums.tokens
        self.seconds += seconds

    def add_epoch(self, point: dict[str, Any]) -> None:
        """Count one finished epoch and keep its point of the curve."""
        self.history.append(point)
        self.epoch += 1
        self.group = 0
        self.epoch_loss = 0.0
        self.epoch_penalty = 0.0
        self.epoch_targets = 0

    def offer(self, quality: list[float], parameters: Mapping[str, Tensor]) -> None:
        """Keep a prompt if it is better than the best so far; among equals the earlier stays."""
        if self.best_quality is not None and quality <= self.best_quality:
            self.stale_epochs += 1
            return
        self.best_quality = quality
        self.best_epoch, self.stale_epochs = self.epoch + 1, 0
        self.best = {name: value.detach().clone() for name, value in parameters.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tensors as JSON values."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "best"}

    @property
    def mean_loss(self) -> float:
        """Loss per target token of the current epoch so far, in nats."""
        return self.epoch_loss / max(self.epoch_targets, 1)

    @property
    def mean_penalty(self) -> float:
        """What distillation added per target token of the current epoch so far, in nats."""
        return self.epoch_penalty / max(self.epoch_targets, 1)

    @property
    def tokens_per_second(self) -> float:
        """Source and target tokens trained on per second, without validation."""
        return self.tokens / self.seconds if self.seconds else 0.0
