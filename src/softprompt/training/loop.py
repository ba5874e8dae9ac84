"""The one training loop: batches, gradient of the token mean, clip, step, validate, remember.

The loss of an update is the negative sum of all its target log-probabilities over the number of its
target tokens, whatever the micro-batches were, so accumulation gives the gradient of one big batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from softprompt.data.batches import plan_batches, split_batch
from softprompt.engine.rows import Engine, EngineRow
from softprompt.errors import TrainingError
from softprompt.training.events import Events
from softprompt.training.optimisation import rate_factor, set_rate
from softprompt.training.settings import RATE_PER_RMS, TuneSettings
from softprompt.training.state import RunState
from softprompt.training.validation import Validation

Update = list[list[int]]
"""Micro-batches of row numbers whose gradients make one update."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained on what: fixed for the whole run, also across a resume."""

    engine: Engine
    model: Module
    prompt: Parameter
    rows: Sequence[EngineRow]
    settings: TuneSettings
    learning_rate: float
    embedding_rms: float
    validation: Validation | None = None

    def updates(self, epoch: int) -> list[Update]:
        """Return the updates of an epoch: a function of (seed, epoch) only."""
        chosen = self.settings
        lengths = [len(row.source) + len(row.target) for row in self.rows]
        batches = plan_batches(lengths, chosen.batch_size, seed=chosen.seed, epoch=epoch)
        size, budget = chosen.accumulate_steps, chosen.max_tokens_per_batch
        updates = [batches[start : start + size] for start in range(0, len(batches), size)]
        if budget is None:
            return updates
        # The budget splits passes, never updates: memory changes, the optimiser does not notice.
        return [
            [part for batch in update for part in split_batch(batch, lengths, budget)]
            for update in updates
        ]

    def total_updates(self) -> int:
        """Return the updates of the whole run."""
        return self.settings.num_epochs * len(self.updates(0))


def train(
    job: Job,
    state: RunState,
    optimizer: torch.optim.Optimizer,
    events: Events,
    *,
    check_stop: Callable[[], None],
    save: Callable[[], None],
) -> None:
    """Train ``job.prompt`` from ``state`` to the end, both always at the border of an update.

    Raises:
        TrainingInterrupted: ``check_stop`` said so; ``state`` can be saved and continued.
        TrainingError: the loss or the gradient is not finite.
    """
    settings, total = job.settings, job.total_updates()
    while state.epoch < settings.num_epochs and not _patience_is_over(settings, state):
        for update in job.updates(state.epoch)[state.group :]:
            started = time.perf_counter()
            factor = rate_factor(settings.schedule, state.update, total, settings.warmup_ratio)
            rate = job.learning_rate * factor
            set_rate(optimizer, rate)
            loss_sum, targets, tokens = _accumulate(job, update, state, check_stop)
            _clip(job, state)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - started
            state.add_update(loss_sum, targets, tokens, seconds=seconds, rate=rate)
            events.update(state, loss_sum / targets)
        _finish_epoch(job, state, events)
        save()


def _accumulate(
    job: Job, update: Update, state: RunState, check_stop: Callable[[], None]
) -> tuple[float, int, int]:
    """Add up the gradient of an update; returns summed loss, target tokens and all tokens."""
    rows = [job.rows[i] for batch in update for i in batch]
    targets = sum(len(row.target) for row in rows)
    loss_sum = 0.0
    job.prompt.grad = None
    with _dropout(job, state.update):
        for batch in update:
            check_stop()
            scores = job.engine.target_log_probs([job.rows[i] for i in batch], [job.prompt])
            loss = -scores.values.sum()
            _check_loss(job, state, batch, scores.values, scores.row_index)
            (loss / targets).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.item()
    return loss_sum, targets, targets + sum(len(row.source) for row in rows)


def _finish_epoch(job: Job, state: RunState, events: Events) -> None:
    point: dict[str, Any] = {
        "epoch": state.epoch + 1,
        "update": state.update,
        "loss": state.mean_loss,
        "learning_rate": state.learning_rate,
    }
    if job.validation is not None:
        metrics = job.validation.metrics(job.prompt.detach())
        point["validation"] = metrics
        state.offer(job.validation.quality(metrics), job.prompt)
    state.add_epoch(point)
    events.epoch(point)


def _patience_is_over(settings: TuneSettings, state: RunState) -> bool:
    patience = settings.early_stopping_patience
    return patience is not None and state.stale_epochs >= patience


@contextmanager
def _dropout(job: Job, update: int) -> Iterator[None]:
    """Run the base with its dropout, seeded by (seed, update); by default without any."""
    if not job.settings.keep_dropout:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(job.settings.seed * 1_000_003 + update)
        job.model.train()
        try:
            yield
        finally:
            job.model.eval()


def _clip(job: Job, state: RunState) -> None:
    limit = job.settings.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_([job.prompt], limit)
    if not torch.isfinite(norm):
        raise TrainingError(f"{_where(state)}: the gradient is {norm.item()}; {_cause(job)}")


def _check_loss(
    job: Job, state: RunState, batch: list[int], values: Tensor, row_index: Tensor
) -> None:
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    bad = sorted({batch[i] + 1 for i in row_index[~finite].tolist()})
    rows = ", ".join(map(str, bad[:10])) + (" ..." if len(bad) > 10 else "")
    raise TrainingError(
        f"{_where(state)}: the loss is not finite for {len(bad)} of {len(batch)} rows of the "
        f"batch (training rows {rows}); {_cause(job)}"
    )


def _where(state: RunState) -> str:
    return f"update {state.update + 1} (epoch {state.epoch + 1})"


def _cause(job: Job) -> str:
    """Name the likely cause of a number that is not finite, and what to do."""
    rms = job.prompt.detach().double().pow(2).mean().sqrt().item()
    relative = job.learning_rate / job.embedding_rms
    if not math.isfinite(rms) or rms > 100 * job.embedding_rms:
        return (
            f"the prompt's rms grew to {rms:.3g} against {job.embedding_rms:.3g} of the base's "
            f"embeddings at learning rate {job.learning_rate:.3g} ({relative:.3g} x that rms); "
            f"try {RATE_PER_RMS * job.embedding_rms:.2g} or less"
        )
    return (
        f"the prompt itself is sound (rms {rms:.3g}, learning rate {relative:.3g} x the "
        "embedding rms), so look at these rows, or use torch_dtype float32"
    )
