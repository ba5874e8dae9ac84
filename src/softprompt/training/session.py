"""One run from its start, or from where it was interrupted, to its best prompt.

A run has one stage, its prompt; with several tasks teachers are trained first, and then their student.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt.errors import TrainingInterrupted
from softprompt.prompts import CPTConfig, PromptModule, context_labels
from softprompt.training.events import Events
from softprompt.training.interrupt import StopSignal, how_to_go_on
from softprompt.training.loop import Measure, Stage, train
from softprompt.training.objectives import (
    ContextLikelihood,
    Distillation,
    Likelihood,
    Objective,
    TeacherPrompts,
)
from softprompt.training.optimisation import build_optimizer
from softprompt.training.preparation import Prepared, teacher_prompt
from softprompt.training.sampling import Sampling
from softprompt.training.settings import DISTILLATION_WEIGHT
from softprompt.training.state import RunState, Snapshot, save_state, state_path
from softprompt.training.validation import TaskValidations, Validation

TEACHERS = "teachers"
TEACHER_LOG_FILE = "teacher_training_logs.jsonl"


def stages_of(
    prepared: Prepared, earlier: Mapping[str, Tensor], check_stop: Callable[[], None]
) -> Iterator[Stage]:
    """Yield the stages of a run in order, each when those before it are done.

    Args:
        prepared: The run.
        earlier: The teachers' parameters, when an interrupted run had them already.
        check_stop: Called between the batches of a validation.
    """
    weight = prepared.settings.distillation_weight
    if len(prepared.tasks) < 2 or weight == 0:
        yield _stage(prepared, prepared.module, _likelihood(prepared), check_stop)
        return
    teachers = TeacherPrompts(
        [teacher_prompt(prepared, number) for number in range(len(prepared.tasks))]
    )
    if earlier:
        teachers.load_stored(earlier)
    first = _stage(prepared, teachers, Likelihood(prepared.engine), check_stop, mixed=False)
    yield replace(first, name=TEACHERS, log_file=TEACHER_LOG_FILE, is_needed=True)
    teachers.requires_grad_(False)
    weight = DISTILLATION_WEIGHT if weight is None else weight
    objective = Distillation(prepared.engine, teachers, weight)
    yield _stage(prepared, prepared.module, objective, check_stop)


def _likelihood(prepared: Prepared) -> Objective:
    """Return the loss of the prompt's method."""
    config = prepared.config
    labels = context_labels(config) if isinstance(config, CPTConfig) else ()
    return ContextLikelihood(prepared.engine, labels) if labels else Likelihood(prepared.engine)


def _stage(
    prepared: Prepared,
    prompt: PromptModule,
    objective: Objective,
    check_stop: Callable[[], None],
    *,
    mixed: bool = True,
) -> Stage:
    """Return what trains a prompt on the rows of all tasks; ``mixed`` draws several into a batch."""
    settings = prepared.settings
    rows = [row for task in prepared.tasks for row in task.train]
    tasks = [number for number, task in enumerate(prepared.tasks) for _ in task.train]
    several = mixed and len(prepared.tasks) > 1
    sampling = Sampling(
        lengths=[len(row.source) + len(row.target) for row in rows],
        tasks=tasks,
        batch_size=settings.batch_size,
        accumulate_steps=settings.accumulate_steps,
        seed=settings.seed,
        max_tokens=settings.max_tokens_per_batch,
        mixed=(settings.task_sampling or "proportional") if several else None,
    )
    return Stage(
        prompt=prompt,
        objective=objective,
        rows=rows,
        sampling=sampling,
        model=prepared.base.model,
        settings=settings,
        learning_rate=prepared.rates.prompt,
        rms=prepared.rates.rms,
        validation=_validation(prepared, check_stop),
        task_names=prepared.names,
        context_tokens=(
            objective.tokens_per_row if isinstance(objective, ContextLikelihood) else 0
        ),
        distils=isinstance(objective, Distillation),
    )


def _validation(prepared: Prepared, check_stop: Callable[[], None]) -> Measure | None:
    parts = [
        Validation(
            prepared.engine,
            task.validation,
            task.labels,
            prepared.settings.batch_size * 4,
            check_stop,
            number,
            task.data.name,
        )
        for number, task in enumerate(prepared.tasks)
        if task.validation
    ]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else TaskValidations(parts)


@dataclass(frozen=True, slots=True)
class Trained:
    """Metrics and history of a trained prompt, which itself is in its module."""

    metrics: dict[str, Any]
    history: list[dict[str, Any]]


def run(
    prepared: Prepared, output: Path | None, stop: StopSignal, found: Snapshot | None = None
) -> Trained:
    """Train the prompt in place and leave the best one in it.

    Args:
        prepared: What is trained on what.
        output: Where the state is kept; None keeps none.
        stop: Checked before each batch.
        found: The state of the run to be continued.

    Raises:
        TrainingInterrupted: with the command that continues, when there is an ``output``.
        TrainingError: the loss is not finite.
    """
    session = _Session(prepared, output, stop, identity(prepared))
    if found is not None:
        session.earlier = dict(found.tensors["earlier"])
        session.results = dict(found.results)
    trained = Trained({}, [])
    for stage in stages_of(prepared, session.earlier, stop.check):
        if stage.name in session.results:
            continue
        trained = session.run(stage, found)
        found = None
        session.results[stage.name] = trained.metrics
        if stage.is_needed:
            session.earlier = dict(stage.prompt.state_dict())
    earlier = dict(list(session.results.items())[:-1])
    return Trained(trained.metrics | earlier, trained.history)


@dataclass
class _Session:
    """What the stages of a run share.

    ``earlier`` holds the parameters of finished stages that later ones need, ``results`` their metrics.
    """

    prepared: Prepared
    output: Path | None
    stop: StopSignal
    identity: Mapping[str, Any]
    earlier: dict[str, Tensor] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    def run(self, stage: Stage, found: Snapshot | None) -> Trained:
        """Train one stage, from its snapshot when it was interrupted."""
        optimizer = build_optimizer(stage.settings, stage.prompt, self.prepared.rates)
        state = RunState()
        if found is not None:
            found.restore(stage.prompt, optimizer)
            state = found.run

        def save() -> None:
            if self.output is None:
                return
            snapshot = Snapshot.of(
                stage.name,
                state,
                stage.prompt,
                optimizer,
                earlier=self.earlier,
                results=self.results,
            )
            save_state(self.output, snapshot, self.identity)

        save()
        silent = stage.settings.silence_progress_bars
        log = None if self.output is None else state_path(self.output).with_name(stage.log_file)
        try:
            total = stage.total_updates()
            with Events(log, state, total, silent=silent, of=stage.of) as events:
                train(stage, state, optimizer, events, check_stop=self.stop.check, save=save)
        except TrainingInterrupted:
            save()
            where = f"update {state.update} (epoch {state.epoch + 1}{stage.of})"
            raise TrainingInterrupted(how_to_go_on(f"after {where}", self.output)) from None
        return _best(stage, state)


def identity(prepared: Prepared) -> dict[str, Any]:
    """Return what must be the same for a state to be continued."""
    hashes = {
        " ".join(filter(None, (task.data.name, split))): found["sha256"]
        for task in prepared.tasks
        for split, found in task.data.fingerprints.items()
    }
    return {
        "base model fingerprint": prepared.base.fingerprint.short,
        **{f"{name} data sha256": digest for name, digest in hashes.items()},
    }


def _best(stage: Stage, state: RunState) -> Trained:
    """Put the prompt to keep into its module and sum the stage up."""
    kept = state.epoch
    if stage.settings.keep_best and state.best is not None:
        kept = state.best_epoch
        stage.prompt.load_state_dict(state.best)
    point = state.history[kept - 1]
    metrics: dict[str, Any] = {
        "loss": state.history[-1]["loss"],
        "epoch": kept,
        "epochs": state.epoch,
        "updates": state.update,
        "learning_rate": stage.learning_rate,
        "tokens_per_second": round(state.tokens_per_second, 1),
        "seconds": round(state.seconds, 2),
    }
    if "validation" in point:
        metrics["validation"] = point["validation"]
    return Trained(metrics, state.history)
