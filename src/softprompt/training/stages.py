"""The stages of a run: its prompt alone, or teachers for several tasks and then their student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from softprompt.prompts import PromptModule
from softprompt.training.attachment import fresh_prompt
from softprompt.training.distillation import Distillation
from softprompt.training.events import LOG_FILE
from softprompt.training.job import Job, Measure
from softprompt.training.objective import Likelihood, Objective
from softprompt.training.preparation import Prepared
from softprompt.training.sampling import Sampling
from softprompt.training.settings import DISTILLATION_WEIGHT
from softprompt.training.teachers import TeacherPrompts
from softprompt.training.validation import TaskValidations, Validation

MAIN, TEACHERS = "prompt", "teachers"
TEACHER_LOG_FILE = "teacher_training_logs.jsonl"


@dataclass(frozen=True, slots=True)
class Stage:
    """One thing that is trained to its end.

    Attributes:
        name: What its state and its results are kept under.
        job: What is trained on what.
        log_file: Where its updates are logged in the output directory.
        leaves: Whether later stages need what it trained.
    """

    name: str
    job: Job
    log_file: str = LOG_FILE
    leaves: bool = False

    @property
    def of(self) -> str:
        """What a message adds to the number of an epoch."""
        return "" if self.name == MAIN else f" of the {self.name}"


def stages_of(
    prepared: Prepared, earlier: Mapping[str, Tensor], check_stop: Callable[[], None]
) -> Iterator[Stage]:
    """Yield the stages of a run in order, each when those before it are done.

    Args:
        prepared: The run.
        earlier: The teachers' parameters, when an interrupted run had them already.
        check_stop: Asked while validation runs.
    """
    weight = prepared.settings.distillation_weight
    likelihood = Likelihood(prepared.engine)
    if len(prepared.tasks) < 2 or weight == 0:
        yield Stage(MAIN, _job(prepared, prepared.prompt, likelihood, check_stop))
        return
    teachers = _teachers(prepared)
    if earlier:
        teachers.load_stored(earlier)
    job = _job(prepared, teachers, likelihood, check_stop, mixed=False)
    yield Stage(TEACHERS, job, TEACHER_LOG_FILE, leaves=True)
    teachers.requires_grad_(False)
    weight = DISTILLATION_WEIGHT if weight is None else weight
    objective = Distillation(prepared.engine, teachers, weight)
    yield Stage(MAIN, _job(prepared, prepared.prompt, objective, check_stop))


def _teachers(prepared: Prepared) -> TeacherPrompts:
    """Return one fresh plain prompt for each task, started as the settings say."""
    return TeacherPrompts(
        [
            fresh_prompt(
                prepared.base, prepared.facts, task.data.labels, prepared.settings, number=number
            )
            for number, task in enumerate(prepared.tasks)
        ]
    )


def _job(
    prepared: Prepared,
    prompt: PromptModule,
    objective: Objective,
    check_stop: Callable[[], None],
    *,
    mixed: bool = True,
) -> Job:
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
    return Job(
        prompt=prompt,
        objective=objective,
        rows=rows,
        sampling=sampling,
        model=prepared.base.model,
        settings=settings,
        learning_rate=prepared.rates.prompt,
        embedding_rms=prepared.facts.embedding_rms,
        validation=_validation(prepared, check_stop),
        task_names=prepared.names,
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
