"""The training loop: sampling, gradient accumulation and clipping, optimizer step, validation, best prompt.

Which rows make which update is a function of (seed, epoch), so that nothing random is kept. One data set is
shuffled and cut, each row once in an epoch. Several are mixed: each batch draws how many tasks stand in it,
which, and then its rows (Wang et al. 2023, stochastic task sampling).

The loss of an update is the negative sum of all its target log-probabilities over the number of its
target tokens, whatever the micro-batches were, so accumulation gives the gradient of one big batch.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import Module

from softprompt.data import TokenRow, plan_batches, split_batch
from softprompt.engine import EngineRow
from softprompt.errors import TrainingError
from softprompt.prompts import CPTEmbedding, Prompt, PromptModule
from softprompt.training.events import LOG_FILE, Events
from softprompt.training.movement import Movement
from softprompt.training.objectives import BatchLoss, Objective
from softprompt.training.optimisation import rate_factor, set_rates
from softprompt.training.settings import RATE_PER_RMS, TuneSettings
from softprompt.training.state import RunState, Sums

logger = logging.getLogger(__name__)

Update = list[list[int]]
"""Micro-batches of row numbers whose gradients make one update."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How rows are drawn.

    Attributes:
        lengths: Tokens of each row.
        tasks: The task of each row, from 0; rows of a task stand together.
        batch_size: Rows in a batch.
        accumulate_steps: Batches in an update.
        seed: With the epoch the only source of randomness.
        max_tokens: Padded tokens of a pass at most; None is no limit.
        mixed: None goes through all rows; ``proportional`` and ``uniform`` draw mixed batches.
    """

    lengths: Sequence[int]
    tasks: Sequence[int]
    batch_size: int
    accumulate_steps: int
    seed: int
    max_tokens: int | None = None
    mixed: str | None = None

    def updates(self, epoch: int) -> list[Update]:
        """Return the updates of an epoch, counted from 0."""
        if self.mixed is None:
            batches = plan_batches(self.lengths, self.batch_size, seed=self.seed, epoch=epoch)
        else:
            batches = self._mixed_batches(epoch)
        size = self.accumulate_steps
        updates = [batches[start : start + size] for start in range(0, len(batches), size)]
        if self.max_tokens is None:
            return updates
        # The budget splits passes, never updates: memory changes, the optimiser does not notice.
        budget = self.max_tokens
        return [
            [part for batch in update for part in split_batch(batch, self.lengths, budget)] for update in updates
        ]

    def _mixed_batches(self, epoch: int) -> list[list[int]]:
        """Return as many batches as the rows fill; a task runs through its rows in a random order.

        A task whose rows are used up starts again in another order, so a small one is repeated.
        """
        generator = random.Random(f"mixed_batches {self.seed} {epoch}")
        rows: dict[int, list[int]] = {}
        for index, task in enumerate(self.tasks):
            rows.setdefault(task, []).append(index)
        weights = {task: 1.0 if self.mixed == "uniform" else len(own) for task, own in rows.items()}
        waiting: dict[int, list[int]] = {task: [] for task in rows}
        batches = []
        for _ in range(-(-len(self.tasks) // self.batch_size)):
            batch = []
            for task in _tasks_of_batch(generator, weights, self.batch_size):
                if not waiting[task]:
                    waiting[task] = generator.sample(rows[task], len(rows[task]))
                batch.append(waiting[task].pop())
            batches.append(batch)
        return batches


def _tasks_of_batch(generator: random.Random, weights: dict[int, float], batch_size: int) -> list[int]:
    """Draw the task of each row of a batch: at least two tasks, each of them at least once."""
    most = min(len(weights), batch_size)
    count = generator.randint(min(2, most), most)
    left, chosen = dict(weights), []
    for _ in range(count):
        task = generator.choices(list(left), list(left.values()))[0]
        del left[task]
        chosen.append(task)
    rest = generator.choices(chosen, [weights[task] for task in chosen], k=batch_size - count)
    return chosen + rest


TIMED_UPDATES = 10
"""Updates after which the time of the rest is told."""

WORTH_TELLING = 10
"""Seconds below which it is not."""

MAIN = "prompt"
"""Name of the stage that trains the prompt itself."""


class Measure(Protocol):
    """Says how good prompts are on rows that were not trained on."""

    def metrics(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Measure the prompts of all tasks, in the order of the tasks."""
        ...

    def quality(self, metrics: dict[str, float]) -> list[float]:
        """Return what decides which epoch is best, first things first; more is better."""
        ...


@dataclass(frozen=True, slots=True)
class Stage:
    """What is trained to its end, on what: fixed from its start, also across a resume.

    Attributes:
        prompt: The module whose parameters are trained.
        objective: What is minimised.
        rows: The tokenised training records.
        sampling: Which of them make which update, and the task of each.
        model: The frozen base.
        learning_rate: Peak learning rate of the prompt.
        rms: Root mean square of the base's own embeddings, or keys and values: the scale of the rate.
        validation: How the prompts are validated after each epoch; None for not at all.
        task_names: Names of the tasks; empty for a single data set.
        context_tokens: Tokens that the objective scores for each row besides its target.
        distils: Whether the objective has a part to report besides the likelihood.
        name: What its state and its results are kept under.
        log_file: Where its updates are logged in the output directory.
        is_needed: Whether a later stage needs what it trained.
        movement: What notes after each epoch how far the prompt has moved; None for nothing.
    """

    prompt: PromptModule
    objective: Objective
    rows: Sequence[TokenRow]
    sampling: Sampling
    model: Module
    settings: TuneSettings
    learning_rate: float
    rms: float
    validation: Measure | None = None
    task_names: tuple[str, ...] = ()
    context_tokens: int = 0
    distils: bool = False
    name: str = MAIN
    log_file: str = LOG_FILE
    is_needed: bool = False
    movement: Movement | None = None

    @property
    def of(self) -> str:
        """What a message adds to the number of an epoch."""
        return "" if self.name == MAIN else f" of the {self.name}"

    def total_updates(self) -> int:
        """Return the updates of the whole stage."""
        return self.settings.max_steps or self.settings.num_epochs * len(self.sampling.updates(0))

    def epochs(self) -> int:
        """Return the epochs of the whole stage, of which ``max_steps`` may leave the last one unfinished."""
        return -(-self.total_updates() // len(self.sampling.updates(0)))

    def name_of(self, index: int) -> str:
        """Return what a message calls a training row: its number, behind its task's name."""
        task = self.sampling.tasks[index]
        before = sum(other < task for other in self.sampling.tasks)
        number = str(index - before + 1)
        return f"{self.task_names[task]} {number}" if self.task_names else number


def train(
    stage: Stage,
    state: RunState,
    optimizer: torch.optim.Optimizer,
    events: Events,
    *,
    check_stop: Callable[[], None],
    save: Callable[[], None],
) -> None:
    """Train ``stage.prompt`` from ``state`` to the end, both always at the border of an update.

    Raises:
        TrainingInterrupted: ``check_stop`` said so; ``state`` can be saved and continued.
        TrainingError: the loss or the gradient is not finite.
    """
    settings, total, epochs = stage.settings, stage.total_updates(), stage.epochs()
    stage.prompt.eval()
    while state.epoch < epochs and not (_patience_is_over(settings, state) or events.stopped):
        events.begin("epoch")
        updates = stage.sampling.updates(state.epoch)
        done = state.update - state.group
        for update in updates[state.group : total - done]:
            events.begin("step")
            started = time.perf_counter()
            factor = rate_factor(settings.schedule, state.update, total, settings.warmup_ratio)
            set_rates(optimizer, factor)
            sums = _accumulate(stage, update, state, check_stop)
            _clip(stage, state)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if isinstance(stage.prompt, CPTEmbedding):
                stage.prompt.project_()
            seconds = time.perf_counter() - started
            state.add_update(sums, seconds=seconds, rate=stage.learning_rate * factor)
            events.update(state, sums.loss / sums.targets)
            if state.update == TIMED_UPDATES:
                _tell_time(state, total)
            if events.epoch_stopped:
                break
        _finish_epoch(stage, state, events)
        save()


def passed(stage: Stage, batch: list[int]) -> None:
    """Run rows forward and backward as an update would, and keep nothing of it."""
    _accumulate(stage, [batch], RunState(), lambda: None)
    for parameter in stage.prompt.parameters():
        parameter.grad = None


def _tell_time(state: RunState, total: int) -> None:
    left = state.seconds / state.update * (total - state.update)
    if left >= WORTH_TELLING:
        logger.info("about %s left for %d steps, without validation", duration(left), total - state.update)


def duration(seconds: float) -> str:
    """Return a duration in the unit that fits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _accumulate(stage: Stage, update: Update, state: RunState, check_stop: Callable[[], None]) -> Sums:
    """Accumulate the gradient of an update over its micro-batches.

    Each task's prompt is made once; the passes add their gradients to that value, and only their
    sum goes through the parameters behind it, which is the same by the chain rule.
    """
    used = [i for batch in update for i in batch]
    rows = [stage.rows[i] for i in used]
    targets = sum(row.scored for row in rows)
    sums = Sums(targets=targets, tokens=sum(len(row.source) + len(row.target) for row in rows))
    divisor = targets + len(used) * stage.context_tokens
    tasks = sorted({stage.sampling.tasks[i] for i in used})
    seed = stage.settings.seed
    with _dropout(stage.prompt, _drops(stage.prompt), seed * 1_000_033 + state.update):
        prompts = {task: stage.prompt.prompt(task) for task in tasks}
    leaves = {task: prompt.leaves() for task, prompt in prompts.items()}
    for parameter in stage.prompt.parameters():
        parameter.grad = None
    with _dropout(stage.model, stage.settings.keep_dropout, seed * 1_000_003 + state.update):
        for batch in update:
            check_stop()
            part = _batch_loss(stage, batch, leaves)
            _check_loss(stage, state, batch, part)
            (part.loss / divisor).backward()  # type: ignore[no-untyped-call]
            sums.loss -= part.values.detach().sum().item()
            sums.penalty += 0.0 if part.penalty is None else part.penalty.item()
    made = [tensor for prompt in prompts.values() for tensor in prompt.tensors]
    summed = [leaf.grad for prompt in leaves.values() for leaf in prompt.tensors]
    pairs = [pair for pair in zip(made, summed, strict=True) if pair[1] is not None]
    torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])
    return sums


def _batch_loss(stage: Stage, batch: Sequence[int], prompts: Mapping[int, Prompt]) -> BatchLoss:
    """Run the rows of a micro-batch, each with the prompt of its task."""
    tasks = [stage.sampling.tasks[i] for i in batch]
    rows = [
        EngineRow(row.source, row.target, prompts[task], row.at, row.unscored)
        for row, task in zip((stage.rows[i] for i in batch), tasks, strict=True)
    ]
    return stage.objective(rows, tasks)


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


def _patience_is_over(settings: TuneSettings, state: RunState) -> bool:
    patience = settings.early_stopping_patience
    return patience is not None and state.stale_epochs >= patience


@contextmanager
def _dropout(module: Module, active: bool, seed: int) -> Iterator[None]:
    """Run a module with its dropout, seeded and leaving global randomness alone, or without any."""
    if not active:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module.train()
        try:
            yield
        finally:
            module.eval()


def _drops(prompt: PromptModule) -> bool:
    """Return whether a prompt has dropout of its own, as P-tuning's LSTM may have."""
    return any(getattr(module, "dropout", 0.0) for module in prompt.modules())


def _clip(stage: Stage, state: RunState) -> None:
    limit = stage.settings.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(stage.prompt.parameters(), limit)
    if not torch.isfinite(norm):
        raise TrainingError(f"{_where(state)}: the gradient is {norm.item()}; {_cause(stage)}")


def _check_loss(stage: Stage, state: RunState, batch: list[int], loss: BatchLoss) -> None:
    finite = torch.isfinite(loss.values)
    sound = loss.penalty is None or bool(torch.isfinite(loss.penalty))
    if bool(finite.all()) and sound:
        return
    bad = sorted({batch[i] for i in loss.row_index[~finite].tolist()}) or batch
    rows = ", ".join(stage.name_of(i) for i in bad[:10]) + (" ..." if len(bad) > 10 else "")
    raise TrainingError(
        f"{_where(state)}: the loss is not finite for {len(bad)} of {len(batch)} rows of the "
        f"batch (training rows {rows}); {_cause(stage)}"
    )


def _where(state: RunState) -> str:
    return f"update {state.update + 1} (epoch {state.epoch + 1})"


def _cause(stage: Stage) -> str:
    """Name the likely cause of a number that is not finite, and what to do."""
    with torch.no_grad():
        rms = stage.prompt.materialize().double().pow(2).mean().sqrt().item()
    relative = stage.learning_rate / stage.rms
    if not math.isfinite(rms) or rms > 100 * stage.rms:
        return (
            f"the prompt's rms grew to {rms:.3g} against {stage.rms:.3g} in the base "
            f"at learning rate {stage.learning_rate:.3g} ({relative:.3g} x that rms); "
            f"try {RATE_PER_RMS * stage.rms:.2g} or less"
        )
    return (
        f"the prompt itself is sound (rms {rms:.3g}, learning rate {relative:.3g} x the "
        "base's rms), so look at these rows, or use torch_dtype float32"
    )
