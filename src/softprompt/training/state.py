"""Where a run is: the one value that, with the settings, decides how it goes on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


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
    epoch_targets: int = 0
    learning_rate: float = 0.0  # of the last update
    tokens: int = 0
    seconds: float = 0.0
    stale_epochs: int = 0
    best_epoch: int = 0
    best_quality: list[float] | None = None
    best_prompt: Tensor | None = None  # [P, H]
    history: list[dict[str, Any]] = field(default_factory=list)

    def add_update(
        self, loss_sum: float, targets: int, tokens: int, *, seconds: float, rate: float
    ) -> None:
        """Count one finished update: summed loss, target tokens, all tokens, seconds, its rate."""
        self.learning_rate = rate
        self.group += 1
        self.update += 1
        self.epoch_loss += loss_sum
        self.epoch_targets += targets
        self.tokens += tokens
        self.seconds += seconds

    def add_epoch(self, point: dict[str, Any]) -> None:
        """Count one finished epoch and keep its point of the curve."""
        self.history.append(point)
        self.epoch += 1
        self.group = 0
        self.epoch_loss = 0.0
        self.epoch_targets = 0

    def offer(self, quality: list[float], prompt: Tensor) -> None:
        """Keep a prompt if it is better than the best so far; among equals the earlier stays."""
        if self.best_quality is not None and quality <= self.best_quality:
            self.stale_epochs += 1
            return
        self.best_quality = quality
        self.best_epoch, self.stale_epochs = self.epoch + 1, 0
        self.best_prompt = prompt.detach().clone()

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tensor as JSON values."""
        return asdict(self) | {"best_prompt": None}

    @property
    def mean_loss(self) -> float:
        """Loss per target token of the current epoch so far, in nats."""
        return self.epoch_loss / max(self.epoch_targets, 1)

    @property
    def tokens_per_second(self) -> float:
        """Source and target tokens trained on per second, without validation."""
        return self.tokens / self.seconds if self.seconds else 0.0
