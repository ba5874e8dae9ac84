"""The training loop: gradient accumulation, gradient clipping, optimizer step, validation, best prompt.

The loss of an update is the negative sum of all its target log-probabilities over the number of its
target tokens, whatever the micro-batches were, so accumulation gives the gradient of one big batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from softprompt.engine import EngineRow
from softprompt.errors import TrainingError
from softprompt.prompts import Prompt
from softprompt.training.events import Events
from softprompt.training.job import Job
from softprompt.training.objective import Scored
from softprompt.training.optimisation import rate_factor, set_rates
from softprompt.training.sampling import Update
from softprompt.training.settings import RATE_PER_RMS, TuneSettings
from softprompt.training.state import RunState, Sums


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
        for update in job.sampling.updates(state.epoch)[state.group :]:
            started = time.perf_counter()
            factor = rate_factor(settings.schedule, state.update, total, settings.warmup_ratio)
            set_rates(optimizer, factor)
            sums = _accumulate(job, update, state, check_stop)
            _clip(job, state)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - started
            state.add_update(sums, seconds=seconds, rate=job.learning_rate * factor)
            events.update(state, sums.loss / sums.targets)
        _finish_epoch(job, state, events)
        save()


def _accumulate(job: Job, update: Update, state: RunState, check_stop: Callable[[], None]) -> Sums:
    """Accumulate the gradient of an update over its micro-batches.

    Each task's prompt is made once; the passes add their gradients to that value, and only their
    sum goes through the parameters behind it, which is the same by the chain rule.
    """
    used = [i for batch in update for i in batch]
    rows = [job.rows[i] for i in used]
    targets = sum(len(row.target) for row in rows)
    sums = Sums(targets=targets, tokens=targets + sum(len(row.source) for row in rows))
    tasks = sorted({job.sampling.tasks[i] for i in used})
    prompts = {task: job.prompt.prompt(task) for task in tasks}
    leaves = {task: prompt.leaves() for task, prompt in prompts.items()}
    for parameter in job.prompt.parameters():
        parameter.grad = None
    with _dropout(job, state.update):
        for batch in update:
            check_stop()
            scored = _scored(job, batch, leaves)
            _check_loss(job, state, batch, scored)
            (scored.loss / targets).backward()  # type: ignore[no-untyped-call]
            sums.loss -= scored.values.detach().sum().item()
            sums.penalty += 0.0 if scored.penalty is None else scored.penalty.item()
    made = [tensor for prompt in prompts.values() for tensor in prompt.tensors]
    summed = [leaf.grad for prompt in leaves.values() for leaf in prompt.tensors]
    pairs = [pair for pair in zip(made, summed, strict=True) if pair[1] is not None]
    torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])
    return sums


def _scored(job: Job, batch: Sequence[int], prompts: Mapping[int, Prompt]) -> Scored:
    """Run the rows of a micro-batch, each with the prompt of its task."""
    tasks = [job.sampling.tasks[i] for i in batch]
    rows = [
        EngineRow(row.source, row.target, prompts[task], row.at)
        for row, task in zip((job.rows[i] for i in batch), tasks, strict=True)
    ]
    return job.objective(rows, tasks)


def _finish_epoch(job: Job, state: RunState, events: Events) -> None:
    point: dict[str, Any] = {
        "epoch": state.epoch + 1,
        "update": state.update,
        "loss": state.mean_loss,
        "learning_rate": state.learning_rate,
    }
    if job.distils:
        point["distillation"] = state.mean_penalty
    if job.validation is not None:
        with torch.no_grad():
            prompts = [job.prompt.prompt(task) for task in range(job.prompt.num_tasks)]
        metrics = job.validation.metrics(prompts)
        point["validation"] = metrics
        state.offer(job.validation.quality(metrics), job.prompt.state_dict())
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
    norm = torch.nn.utils.clip_grad_norm_(job.prompt.parameters(), limit)
    if not torch.isfinite(norm):
        raise TrainingError(f"{_where(state)}: the gradient is {norm.item()}; {_cause(job)}")


def _check_loss(job: Job, state: RunState, batch: list[int], scored: Scored) -> None:
    finite = torch.isfinite(scored.values)
    sound = scored.penalty is None or bool(torch.isfinite(scored.penalty))
    if bool(finite.all()) and sound:
        return
    bad = sorted({batch[i] for i in scored.row_index[~finite].tolist()}) or batch
    rows = ", ".join(job.name_of(i) for i in bad[:10]) + (" ..." if len(bad) > 10 else "")
    raise TrainingError(
        f"{_where(state)}: the loss is not finite for {len(bad)} of {len(batch)} rows of the "
        f"batch (training rows {rows}); {_cause(job)}"
    )


def _where(state: RunState) -> str:
    return f"update {state.update + 1} (epoch {state.epoch + 1})"


def _cause(job: Job) -> str:
    """Name the likely cause of a number that is not finite, and what to do."""
    with torch.no_grad():
        rms = job.prompt.materialize().double().pow(2).mean().sqrt().item()
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
