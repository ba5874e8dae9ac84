"""One run from its start, or from where it was interrupted, to its best prompt; and its validation.

A run has one stage, its prompt; with several tasks teachers are trained first, and then their student.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

from torch import Tensor

from softprompt.engine import EngineRow, require_gradient, score_of
from softprompt.errors import ConfigError, DistributedError, ProcessLostError, TrainingError, TrainingInterrupted
from softprompt.prompts import CPTConfig, PromptModule, context_labels
from softprompt.training.collapse import CollapseWatch
from softprompt.training.divergence import TopDivergence
from softprompt.training.events import Callbacks, Events
from softprompt.training.loop import Candidate, train_together
from softprompt.training.objectives import (
    ContextLikelihood,
    Distillation,
    LabelChoice,
    Objective,
    TeacherPrompts,
    likelihood_of,
)
from softprompt.training.optimisation import build_optimizer
from softprompt.training.output import ended_by, how_to_go_on, state_path
from softprompt.training.preparation import Prepared, teacher_prompt
from softprompt.training.sampling import Sampling
from softprompt.training.settings import DISTILLATION_WEIGHT
from softprompt.training.stage import Measure, Movement, Stage
from softprompt.training.state import RunState, Saving, Snapshot, StopSignal, save_states
from softprompt.training.validation import TaskValidations, Validation
from softprompt.world import world

logger = logging.getLogger(__name__)


TEACHERS = "teachers"
TEACHER_LOG_FILE = "teacher_training_logs.jsonl"


def stages_of(prepared: Prepared, earlier: Mapping[str, Tensor], check_stop: Callable[[], None]) -> Iterator[Stage]:
    """Yield the stages of a run in order, each when those before it are done.

    Args:
        prepared: The run.
        earlier: The teachers' parameters, when an interrupted run had them already.
        check_stop: Called between the batches of a validation.

    Raises:
        ConfigError: There is no choice among labels that ``choice_weight`` could count.
    """
    weight, choice = prepared.settings.distillation_weight, prepared.settings.choice_weight
    if choice and prepared.goal is None and not isinstance(_likelihood(prepared), LabelChoice):
        raise ConfigError(
            "choice_weight would be ignored: it needs one data set whose targets are labels, two or more, and "
            "another method than CPT; leave it out"
        )
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
    """Return what is minimised: what was asked for, or the loss of the prompt's method."""
    if prepared.goal is not None:
        return prepared.goal.objective
    config = prepared.config
    if isinstance(config, CPTConfig):
        labels = context_labels(config)
        return ContextLikelihood(prepared.engine, labels) if labels else likelihood_of(prepared.engine)
    targets = (prepared.tasks[0].labels or {}) if len(prepared.tasks) == 1 else {}
    return likelihood_of(prepared.engine, tuple(targets.values()), prepared.settings.choice_weight)


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
        usual_rate=prepared.rates.usual,
        validation=_validation(prepared, check_stop),
        task_names=prepared.names,
        context_tokens=(objective.tokens_per_row if isinstance(objective, ContextLikelihood) else 0),
        distils=isinstance(objective, Distillation | TopDivergence),
        hidden=prepared.hidden,
        movement=Movement(prompt),
    )


def _validation(prepared: Prepared, check_stop: Callable[[], None]) -> Measure | None:
    if prepared.goal is not None:
        return prepared.goal.measure
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


def candidate_of(prepared: Prepared, check_stop: Callable[[], None] = lambda: None) -> Candidate:
    """Return a run as a candidate for `train_together`: from its start, nothing shown and nothing written."""
    stage = _stage(prepared, prepared.module, _likelihood(prepared), check_stop)
    optimizer, state = build_optimizer(stage.settings, stage.prompt, prepared.rates), RunState()
    events = Events(None, state, stage.total_updates(), silent=True, level=logging.DEBUG)
    return Candidate(stage, state, optimizer, events)


@final
@dataclass(eq=False)
class Member:
    """One run among those that are trained together, with a name (empty for one alone) of the kind ``what``.

    ``found`` is where an interrupted one was, ``earlier`` holds the parameters of finished stages that later ones
    need, ``results`` their metrics.
    """

    name: str
    prepared: Prepared
    callbacks: Sequence[object]
    found: Snapshot | None = None
    what: str = "seed"
    earlier: dict[str, Tensor] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    trained: Trained = field(default_factory=lambda: Trained({}, []))

    def __post_init__(self) -> None:
        if self.found is not None:
            self.earlier, self.results = dict(self.found.tensors["earlier"]), dict(self.found.results)

    def begin(self, stage: Stage) -> None:
        """Put a stage where it begins, or where it was interrupted."""
        self.stage, self.state = stage, RunState()
        self.optimizer = build_optimizer(stage.settings, stage.prompt, self.prepared.rates)
        of = f" of {self.what} {self.name}" if self.name else ""
        total = stage.total_updates()
        move = stage.rms if self.prepared.rates.scales is None else stage.usual_rate
        if self.prepared.goal is not None:
            move = 0.0  # a prompt that starts as its teacher's text may be near it already
        self.watch = CollapseWatch(stage.prompt, stage.rms, stage.learning_rate, move, total, of + stage.of)
        if self.found is not None:
            self.found.restore(stage.prompt, self.optimizer)
            self.state, self.found = self.found.run, None

    def snapshot(self) -> Snapshot:
        """Return where it is; a finished one is at the end of its last stage."""
        stage = self.stage
        results = {name: each for name, each in self.results.items() if name != stage.name}
        return Snapshot.of(
            stage.name, self.state, stage.prompt, self.optimizer, earlier=self.earlier, results=results
        )

    def check_gradient(self) -> None:
        """Check on the shortest row that the base passes its prompt's gradient on.

        Raises:
            TrainingError: It does not; training would go nowhere, or anywhere.
        """
        stage, base = self.stage, self.prepared.base
        shortest = min(range(len(stage.rows)), key=stage.sampling.lengths.__getitem__)
        row, prompt = stage.rows[shortest], stage.prompt.prompt(stage.sampling.tasks[shortest])
        checked = EngineRow(row.source, row.target, None, row.at, row.unscored)
        require_gradient(base, prompt.detach(), score_of(self.prepared.engine, checked))

    def candidate(self, output: Path | None, *, silent: bool) -> Candidate:
        """Return it as a candidate of the loop; its log lies in the state of ``output``."""
        stage, base, total = self.stage, self.prepared.base, self.stage.total_updates()
        name = f"{self.name}.{stage.log_file}" if self.name else stage.log_file
        log = None if output is None else state_path(output).with_name(name)
        of = f" of {self.what} {self.name}{stage.of}" if self.name else stage.of
        others = {"model": base.model, "processing_class": base.tokenizer, "optimizer": self.optimizer}
        run = f"{self.what}-{self.name}" if self.name else ""
        callbacks = Callbacks(self.callbacks, stage.settings, total, **others, stage=stage.name, run=run)
        events = Events(log, self.state, total, silent=silent, of=of, callbacks=callbacks)
        return Candidate(stage, self.state, self.optimizer, events, self.watch)

    def end(self) -> None:
        """Keep what the stage came to."""
        self.trained = best_of(self.stage, self.state)
        self.results[self.stage.name] = self.trained.metrics
        if self.stage.is_needed:
            self.earlier = dict(self.stage.prompt.state_dict())

    def whole(self) -> Trained:
        """Return the metrics of all stages, and the history of the last one."""
        earlier = dict(list(self.results.items())[:-1])
        return Trained(self.trained.metrics | earlier, self.trained.history)


@final
class Session:
    """Prompts that are trained in place, side by side or some after others, and whose states are kept together."""

    def __init__(
        self,
        output: Path | None,
        stop: StopSignal,
        found: Mapping[str, Snapshot] | None = None,
        callbacks: Sequence[object] = (),
    ) -> None:
        """Begin, or go on.

        Args:
            output: Where the states are kept; None keeps none.
            stop: Checked before each batch.
            found: The states of the runs to be continued, by seed.
            callbacks: What is called as it goes, for each of the prompts.
        """
        self.problems: dict[str, TrainingError] = {}
        self._output, self._stop, self._callbacks = output, stop, callbacks
        self._found, self._members = dict(found or {}), list[Member]()

    def train(self, runs: Mapping[str, Prepared]) -> dict[str, Trained]:
        """Train prompts side by side and leave the best of each in its module.

        Args:
            runs: What is trained on what, by seed (empty for one alone), on one base, with stages alike.

        Returns:
            What became of each, without those whose loss was not finite: these are among the ``problems``.

        Raises:
            TrainingInterrupted: with the command that continues, when there is an ``output``.
            TrainingError: the loss is not finite, of all of them.
        """
        require_alike(next(iter(runs.values())))
        members = [Member(seed, each, self._callbacks, self._found.get(seed)) for seed, each in runs.items()]
        self._members += members
        check = self._stop.check
        for stages in zip(*(stages_of(each.prepared, each.earlier, check) for each in members), strict=True):
            if stages[0].name not in members[0].results:
                self._run(members, stages)
        return {each.name: each.whole() for each in members if each.name not in self.problems}

    def _run(self, members: Sequence[Member], stages: Sequence[Stage]) -> None:
        """Train a stage of each, from its snapshot when it was interrupted."""
        for member, stage in zip(members, stages, strict=True):
            member.begin(stage)
        going = [each for each in members if each.name not in self.problems]
        saving = Saving(self._save, members[0].prepared.settings.save_every)
        saving.now()
        for member in going:
            member.check_gradient()
        try:
            with ExitStack() as stack:
                candidates: list[Candidate] = []
                for member in going:
                    silent = bool(candidates) or member.stage.settings.silence_progress_bars
                    candidates.append(member.candidate(self._output, silent=silent))
                    stack.enter_context(candidates[-1].events)
                train_together(candidates, check_stop=self._stop.check, saving=saving)
                self.problems |= {
                    member.name: each.problem
                    for member, each in zip(going, candidates, strict=True)
                    if each.problem
                }
                if len(self.problems) == len(self._members):  # of restarts the earlier ones are kept
                    raise self.problems[going[0].name]
        except (TrainingInterrupted, ProcessLostError) as error:
            saving.now()
            first = members[0]
            where = f"update {first.state.update} (epoch {first.state.epoch + 1}{first.stage.of})"
            raise ended_by(error, how_to_go_on(f"after {where}", self._output)) from None
        for member in going:
            if member.name not in self.problems:
                member.end()

    def _save(self) -> None:
        """Write where all of them are."""
        if self._output is not None:
            snapshots = self._found | {each.name: each.snapshot() for each in self._members}
            save_states(self._output, snapshots, identity(self._members[0].prepared))


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


def require_alike(prepared: Prepared) -> None:
    """Raise ``DistributedError`` where the processes of a run do not have the same base and the same data."""
    found = world().gather(identity(prepared))
    for rank, other in enumerate(found):
        for name, own in found[0].items():
            if other.get(name) != own:
                raise DistributedError(
                    f"the {name} of rank {rank} is {other.get(name)!r}, that of rank 0 is {own!r}; give all "
                    "machines the same files"
                )


def best_of(stage: Stage, state: RunState) -> Trained:
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
    if state.collapse:
        metrics["collapse"] = list(state.collapse.values())
    return Trained(metrics, state.history)
