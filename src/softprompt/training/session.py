"""One run from its start, or from where it was interrupted, to its best prompt; and its validation.

A run has one stage, its prompt; with several tasks teachers are trained first, and then their student.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, final

import torch
from torch import Tensor

from softprompt.data import TokenRow
from softprompt.engine import Engine, EngineRow, require_gradient, score_of
from softprompt.errors import TrainingInterrupted
from softprompt.generation import TargetLikelihood, classify_rows, target_likelihood
from softprompt.prompts import CPTConfig, Prompt, PromptModule, context_labels
from softprompt.training.events import Callbacks, Events
from softprompt.training.loop import Measure, Sampling, Stage, train
from softprompt.training.objectives import ContextLikelihood, Distillation, Objective, TeacherPrompts, likelihood_of
from softprompt.training.optimisation import build_optimizer
from softprompt.training.preparation import Prepared, teacher_prompt
from softprompt.training.settings import DISTILLATION_WEIGHT
from softprompt.training.state import RunState, Snapshot, StopSignal, how_to_go_on, save_state, state_path

logger = logging.getLogger(__name__)

PLATEAU_EPOCHS = 3
ROWS_BETWEEN_STOPS = 256


@dataclass
class Validation:
    """The validation records of one task and how they are scored; with ``labels`` as a classification.

    ``labels`` maps each label to its target ids. ``check_stop`` is called every 256 rows. ``task``
    is the number of the task, ``name`` what it is called among several.
    """

    engine: Engine
    rows: Sequence[TokenRow]
    labels: dict[str, tuple[int, ...]] | None
    batch_size: int
    check_stop: Callable[[], None] = lambda: None
    task: int = 0
    name: str = ""
    _at_chance: int = field(default=0, init=False)

    def metrics(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Measure the task's own of the prompts of all tasks.

        Returns:
            ``accuracy`` (labels) or ``perplexity`` (free text), and ``loss`` (nats per token).
        """
        prompt = prompts[self.task]
        return self._likelihood(prompt) if self.labels is None else self._accuracy(prompt)

    def quality(self, metrics: dict[str, float]) -> list[float]:
        """Return what decides which epoch is best, first things first; more is better.

        The loss decides between equal accuracies, of which a small data set has many.
        """
        by_loss = [-metrics["loss"]]
        return by_loss if self.labels is None else [metrics["accuracy"], *by_loss]

    def _parts(self) -> Iterator[Sequence[TokenRow]]:
        for start in range(0, len(self.rows), ROWS_BETWEEN_STOPS):
            self.check_stop()
            yield self.rows[start : start + ROWS_BETWEEN_STOPS]

    def _likelihood(self, prompt: Prompt) -> dict[str, float]:
        parts = [target_likelihood(self.engine, rows, prompt, batch_size=self.batch_size) for rows in self._parts()]
        whole = TargetLikelihood(sum(p.log_prob for p in parts), sum(p.tokens for p in parts))
        return {"perplexity": whole.perplexity, "loss": whole.loss}

    def _accuracy(self, prompt: Prompt) -> dict[str, float]:
        assert self.labels is not None
        names, ids = list(self.labels), list(self.labels.values())
        parts = [
            classify_rows(self.engine, rows, ids, prompt, batch_size=self.batch_size).scores
            for rows in self._parts()
        ]
        scores = torch.cat(parts).double()  # [N, K]
        gold = torch.tensor([ids.index(row.target) for row in self.rows])
        predicted = scores.argmax(dim=1)
        accuracy = (predicted == gold).double().mean().item()
        log_prob = scores[torch.arange(len(gold)), gold].sum().item()
        self._watch_collapse(predicted.tolist(), gold.tolist(), names, accuracy)
        whole = TargetLikelihood(log_prob, sum(len(row.target) for row in self.rows))
        return {"accuracy": accuracy, "loss": whole.loss}

    def _watch_collapse(self, predicted: list[int], gold: list[int], names: list[str], accuracy: float) -> None:
        """Say so when all records get one label, or accuracy stays at the commonest label's share."""
        answers, truth = Counter(predicted), Counter(gold)
        chance = max(truth.values()) / len(gold)
        self._at_chance = self._at_chance + 1 if accuracy <= chance else 0
        if len(answers) == 1 and len(truth) > 1:
            logger.warning(
                "all %d validation records%s are answered %r; if this lasts, change the learning rate, "
                "the initial prompt or the seed",
                len(gold),
                self._of_task,
                names[predicted[0]],
            )
        if self._at_chance == PLATEAU_EPOCHS:
            logger.warning(
                "validation accuracy %.3f%s is not above the commonest label's share %.3f for %d "
                "epochs; change the learning rate, the initial prompt or the base model",
                accuracy,
                self._of_task,
                chance,
                PLATEAU_EPOCHS,
            )

    @property
    def _of_task(self) -> str:
        return f" of task {self.name}" if self.name else ""


@final
@dataclass
class TaskValidations:
    """Validation of several tasks: each by itself, and the means by which epochs are compared."""

    parts: Sequence[Validation]

    def metrics(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Measure the prompts of all tasks, in the order of the tasks.

        Returns:
            ``accuracy`` (mean over the tasks with labels, if any) and ``loss`` (mean over all
            tasks), then each task's own metrics as ``<task> accuracy`` and so on.
        """
        found = {part.name: part.metrics(prompts) for part in self.parts}
        accuracies = [each["accuracy"] for each in found.values() if "accuracy" in each]
        means = {"accuracy": fmean(accuracies)} if accuracies else {}
        means["loss"] = fmean(each["loss"] for each in found.values())
        own = {f"{task} {name}": v for task, each in found.items() for name, v in each.items()}
        return means | own

    def quality(self, metrics: dict[str, float]) -> list[float]:
        """Return what decides which epoch is best: the mean accuracy, then the mean loss."""
        accuracy = [metrics["accuracy"]] if "accuracy" in metrics else []
        return [*accuracy, -metrics["loss"]]


TEACHERS = "teachers"
TEACHER_LOG_FILE = "teacher_training_logs.jsonl"


def stages_of(prepared: Prepared, earlier: Mapping[str, Tensor], check_stop: Callable[[], None]) -> Iterator[Stage]:
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
    teachers = TeacherPrompts([teacher_prompt(prepared, number) for number in range(len(prepared.tasks))])
    if earlier:
        teachers.load_stored(earlier)
    first = _stage(prepared, teachers, likelihood_of(prepared.engine), check_stop, mixed=False)
    yield replace(first, name=TEACHERS, log_file=TEACHER_LOG_FILE, is_needed=True)
    teachers.requires_grad_(False)
    weight = DISTILLATION_WEIGHT if weight is None else weight
    objective = Distillation(prepared.engine, teachers, weight)
    yield _stage(prepared, prepared.module, objective, check_stop)


def _likelihood(prepared: Prepared) -> Objective:
    """Return the loss of the prompt's method."""
    config = prepared.config
    if isinstance(config, CPTConfig):
        labels = context_labels(config)
        return ContextLikelihood(prepared.engine, labels) if labels else likelihood_of(prepared.engine)
    targets = (prepared.tasks[0].labels or {}) if len(prepared.tasks) == 1 else {}
    return likelihood_of(prepared.engine, tuple(targets.values()), prepared.settings.label_weight)


def _stage(
    prepared: Prepared,
    prompt: PromptModule,
    objective: Objective,
    check_stop: Callable[[], None],
    *,
    mixed: bool = True,
) -> Stage:
    """Return what trains a prompt on the records of all tasks; ``mixed`` draws several into a batch."""
    settings = prepared.settings
    rows = [row for task in prepared.tasks for row in task.train]
    tasks = [number for number, task in enumerate(prepared.tasks) for _ in task.train]
    more = getattr(objective, "other_tokens", 0)
    several = mixed and len(prepared.tasks) > 1
    sampling = Sampling(
        lengths=[len(row.source) + len(row.target) + more for row in rows],
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
        context_tokens=(objective.tokens_per_row if isinstance(objective, ContextLikelihood) else 0),
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

    def timed(self, parts: Mapping[str, float], total: float) -> Trained:
        """Return it with the wall time of the whole run in seconds, and that of its parts, all stages together."""
        stages = [self.metrics, *(each for each in self.metrics.values() if isinstance(each, dict))]
        own = [each["seconds_by_part"] for each in stages if "seconds_by_part" in each]
        summed = {name: sum(each[name] for each in own) for name in ("training", "validation")}
        seconds = {name: round(value, 2) for name, value in {**parts, **summed}.items()}
        return replace(self, metrics=self.metrics | {"seconds": round(total, 2), "seconds_by_part": seconds})


def run(
    prepared: Prepared,
    output: Path | None,
    stop: StopSignal,
    found: Snapshot | None = None,
    callbacks: Sequence[object] = (),
) -> Trained:
    """Train the prompt in place and leave the best one in it.

    Args:
        prepared: What is trained on what.
        output: Where the state is kept; None keeps none.
        stop: Checked before each batch.
        found: The state of the run to be continued.
        callbacks: What is called as it goes.

    Raises:
        TrainingInterrupted: with the command that continues, when there is an ``output``.
        TrainingError: the loss is not finite.
    """
    session = _Session(prepared, output, stop, identity(prepared), callbacks)
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
    callbacks: Sequence[object] = ()
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
                stage.name, state, stage.prompt, optimizer, earlier=self.earlier, results=self.results
            )
            save_state(self.output, snapshot, self.identity)

        save()
        self._check_gradient(stage)
        silent = stage.settings.silence_progress_bars
        log = None if self.output is None else state_path(self.output).with_name(stage.log_file)
        try:
            total, base = stage.total_updates(), self.prepared.base
            others = {"model": base.model, "processing_class": base.tokenizer, "optimizer": optimizer}
            callbacks = Callbacks(self.callbacks, stage.settings, total, **others, stage=stage.name)
            with Events(log, state, total, silent=silent, of=stage.of, callbacks=callbacks) as events:
                train(stage, state, optimizer, events, check_stop=self.stop.check, save=save)
        except TrainingInterrupted:
            save()
            where = f"update {state.update} (epoch {state.epoch + 1}{stage.of})"
            raise TrainingInterrupted(how_to_go_on(f"after {where}", self.output)) from None
        return _best(stage, state)

    def _check_gradient(self, stage: Stage) -> None:
        """Check on the shortest row that the base passes its prompt's gradient on.

        Raises:
            TrainingError: It does not; training would go nowhere, or anywhere.
        """
        base = self.prepared.base
        shortest = min(range(len(stage.rows)), key=stage.sampling.lengths.__getitem__)
        row, prompt = stage.rows[shortest], stage.prompt.prompt(stage.sampling.tasks[shortest])
        checked = EngineRow(row.source, row.target, None, row.at, row.unscored)
        require_gradient(base, prompt.detach(), score_of(self.prepared.engine, checked))


def identity(prepared: Prepared) -> dict[str, Any]:
    """Return what must be the same for a state to be continued."""
    hashes = {
        " ".join(filter(None, (task.data.name, split))): found["sha256"]
        for task in prepared.tasks
        for split, found in task.data.fingerprints.items()
    }
    return {
        "base model fingerprint": prepared.base.fingerprint_record().get("short", ""),
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
        "seconds": round(state.seconds + state.validation_seconds, 2),
        "seconds_by_part": {"training": round(state.seconds, 2), "validation": round(state.validation_seconds, 2)},
    }
    if "validation" in point:
        metrics["validation"] = point["validation"]
    return Trained(metrics, state.history)
