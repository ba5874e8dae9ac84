"""The training loop: update after update, validation, best prompt.

Several prompts are trained side by side: each has its own rows, rate, schedule and optimizer, and the rows of all
of them go through the base together, each prompt once. One alone is the same loop. What a prompt learns depends on
its own rows only, so it is the same beside others up to the rounding of a larger pass.

The loss of an update is the negative sum of all its target log-probabilities over the number of its
target tokens, whatever the micro-batches were, so accumulation gives the gradient of one big batch.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch

from softprompt.errors import DistributedError, TrainingError
from softprompt.training.gradients import steps_of
from softprompt.training.state import RunState, Saving
from softprompt.world import world

if TYPE_CHECKING:
    from softprompt.training.collapse import CollapseWatch
    from softprompt.training.events import Events
    from softprompt.training.sampling import Update
    from softprompt.training.stage import Stage

logger = logging.getLogger(__name__)

TIMED_UPDATES = 10
"""Updates after which the time of the rest is told."""

UPDATES_BETWEEN_CHECKS = 50
"""Updates after which the processes of a run compare their prompts."""

WORTH_TELLING = 10
"""Seconds below which it is not."""


@final
@dataclass(eq=False, slots=True)
class Candidate:
    """A prompt in training, alone or beside others.

    Attributes:
        stage: What is trained on what; no two candidates share a prompt.
        state: Where it is, always at the border of an update.
        optimizer: The optimizer of its parameters; see ``build_optimizer``.
        events: Who is told.
        watch: What looks for signs of collapse; None for nothing.
    """

    stage: Stage
    state: RunState
    optimizer: torch.optim.Optimizer
    events: Events
    watch: CollapseWatch | None = None

    @property
    def problem(self) -> TrainingError | None:
        """Why it goes no further, where a loss or gradient of its own was not finite."""
        return None if self.state.problem is None else TrainingError(self.state.problem)


def train_together(
    candidates: Sequence[Candidate],
    *,
    check_stop: Callable[[], None] = lambda: None,
    saving: Saving | None = None,
    until: int | None = None,
) -> None:
    """Train several prompts side by side, each from its state to its end, an update of every one at a time.

    Rows, seed, rate, schedule, length and method may differ, the base may not. Each prompt's loss is divided by
    its own target tokens and its gradient clipped by its own norm, so it becomes what it would alone, up to the
    rounding of larger passes. Passes are joined up to ``max_tokens_per_batch``, by default ``JOINED_TOKENS``; what
    does not mix has passes of its own: prompts of another kind, objectives but the likelihood, a base with its
    dropout on.

    One whose numbers are not finite keeps its ``problem`` and is left behind. Calls may follow each other with
    fewer candidates and a larger ``until``, as in successive halving.

    Args:
        candidates: The prompts; one with a ``problem`` is left out.
        check_stop: Called before each pass; raises what ends the run. All states can be saved and continued then.
        saving: Saves the states, all candidates at the border of an update: when epochs were finished, and when it
            is time.
        until: Updates of each candidate to stop at, in the middle of an epoch if need be; None for its end.
    """
    saving = saving or Saving(lambda: None)
    running = {each: _updates(each, until) for each in candidates if each.problem is None}
    while running:
        epochs = sum(each.state.epoch for each in running)
        due = [(each, update) for each, own in running.items() if (update := next(own, None)) is not None]
        if sum(each.state.epoch for each in running) > epochs:
            saving.now()
        if due:
            _round(due, check_stop)
            if due[0][0].state.update % UPDATES_BETWEEN_CHECKS == 1:
                _require_same([each for each, _ in due])
            saving.updated()
        running = {each: running[each] for each, _ in due if each.problem is None}
    _require_same(candidates)


def _require_same(candidates: Sequence[Candidate]) -> None:
    """Compare the prompts of all processes, which are the same to the bit.

    Raises:
        DistributedError: They are not: their machines compute unlike each other, or one of them is broken.
    """
    if world().size == 1:
        return
    digest = hashlib.sha256()
    for each in candidates:
        for value in each.stage.prompt.parameters():
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    found = world().gather(digest.hexdigest())
    if other := [str(rank) for rank, each in enumerate(found) if each != found[0]]:
        raise DistributedError(
            f"after update {candidates[0].state.update} the prompt of rank {', '.join(other)} is not that of rank "
            "0; a machine is faulty or has other software: go on with resume=True on others"
        )


def _updates(candidate: Candidate, until: int | None) -> Iterator[Update]:
    """Yield the updates that a candidate has before it; between two of them it finishes its epochs."""
    stage, state, events = candidate.stage, candidate.state, candidate.events
    total, epochs = stage.total_updates(), stage.epochs()
    stage.prompt.eval()
    if stage.validation is not None:
        stage.validation.watch(state.collapse, state.streaks)
    patience = stage.settings.early_stopping_patience or math.inf
    while state.epoch < epochs and state.stale_epochs < patience and not events.stopped:
        events.begin("epoch")
        updates = stage.sampling.updates(state.epoch)
        done = state.update - state.group
        for update in updates[state.group : total - done]:
            if until is not None and state.update >= until:
                return
            events.begin("step")
            yield update
            if events.epoch_stopped:
                break
        _finish_epoch(stage, state, events)


def _round(due: Sequence[tuple[Candidate, Update]], check_stop: Callable[[], None]) -> None:
    """Make one update of each candidate; none of them is changed before all gradients are there."""
    started = time.perf_counter()
    steps = steps_of([(each.stage, each.state, update) for each, update in due], check_stop)
    rates = [step.apply(each.optimizer) for (each, _), step in zip(due, steps, strict=True)]
    seconds = (time.perf_counter() - started) / sum(step.sums.tokens for step in steps)
    for (each, _), step, rate in zip(due, steps, rates, strict=True):
        if step.problem is not None:
            each.state.problem = str(step.problem)
        else:
            each.state.add_update(step.sums, seconds=seconds * step.sums.tokens, rate=rate)
            loss = step.sums.loss / step.sums.targets
            each.events.update(each.state, loss)
            if each.watch is not None:
                each.watch.update(each.state, loss)
    if due[0][0].state.update == TIMED_UPDATES:
        _tell_time([each for each, _ in due])


def _tell_time(candidates: Sequence[Candidate]) -> None:
    left = {each: each.stage.total_updates() - each.state.update for each in candidates}
    seconds = sum(each.state.seconds / max(each.state.update, 1) * count for each, count in left.items())
    if seconds >= WORTH_TELLING:
        logger.info("about %s left for %d steps, without validation", duration(seconds), max(left.values()))


def duration(seconds: float) -> str:
    """Return a duration in the unit that fits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _finish_epoch(stage: Stage, state: RunState, events: Events) -> None:
    point: dict[str, Any] = {
        "epoch": state.epoch + 1,
        "update": state.update,
        "loss": state.mean_loss,
        "learning_rate": state.learning_rate,
    }
    if stage.distils:
        point["distillation"] = state.mean_penalty
    if stage.validation is not None:
        started = time.perf_counter()
        with torch.no_grad():
            prompts = [stage.prompt.prompt(task) for task in range(stage.prompt.num_tasks)]
        metrics = stage.validation.metrics(prompts)
        point["validation"] = metrics
        state.offer(stage.validation.quality(metrics), stage.prompt.state_dict())
        state.validation_seconds += time.perf_counter() - started
    point |= {} if stage.movement is None else stage.movement.point()
    state.add_epoch(point)
    events.epoch(point)
