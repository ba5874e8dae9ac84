"""Evaluating a prompt, its base alone and what else it should beat, on records that were not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from softprompt.data import DataSource, LabelNames, read_records
from softprompt.errors import ConfigError, DataError, nearest
from softprompt.evaluation import (
    Baseline,
    EvaluationSettings,
    Numbered,
    Report,
    check_predictions,
    joined,
    prompted,
    report_of,
    task_of,
    write_predictions,
)
from softprompt.inference import Ensemble, TaskNames, TunedPrompt
from softprompt.inference import Task as TaskName
from softprompt.world import world

if TYPE_CHECKING:
    from softprompt.evaluation.passes import Task

Subject: TypeAlias = TunedPrompt | Ensemble | Baseline
"""What can be evaluated."""


def evaluate(
    subject: Subject,
    data: DataSource,
    *,
    without_prompt: bool = False,
    baselines: Sequence[Baseline] = (),
    batch_size: int = 32,
    input_field: str | None = None,
    output_field: str | None = None,
    label_names: LabelNames | None = None,
    task: Task | None = None,
    task_name: TaskNames | None = None,
    task_field: str | None = None,
    limit: int | None = None,
    normalize: bool = False,
    engine: str = "auto",
    predictions: str | Path | None = None,
    overwrite: bool = False,
    silence_progress_bars: bool = False,
) -> Report:
    """Evaluate a prompt, an ensemble of prompts or a base alone on every record of ``data``.

    Labels are scored over the label set; free text is generated greedily, with at most
    ``max_target_length`` tokens, and compared with the target. The report of an ensemble holds those of
    its members, and ``outcomes`` holds what became of each record.

    Args:
        subject: The prompt with its model, an ensemble, or a baseline with a base model of its own.
        data: A path, or records; read as in training.
        without_prompt: Evaluate the base with the template alone, as ``Baseline()`` does.
        baselines: What else to evaluate on the same records, for ``baselines`` of the report.
        batch_size: Rows, or (row, label) pairs, in one pass.
        input_field: Input column; None takes the one the prompt was tuned with.
        output_field: Target column; None takes the one the prompt was tuned with.
        label_names: Names of targets such as numbers; None takes those the prompt was tuned with.
        task: Overrides the prompt's own task.
        task_name: The task of a multitask prompt, or of an ensemble's members, by name or number; or a
            list of one for each row.
        task_field: Column that names each row's task. The report of several tasks holds those of each.
        limit: Rows from the start of ``data`` to evaluate; None is all.
        normalize: Divide a label's log-probability by its token count.
        engine: Path that scores targets; ``auto`` is the fastest exact one.
        predictions: File that gets the outcome of each record, as JSON lines.
        overwrite: Replace that file where it exists.
        silence_progress_bars: Show no progress bar on a terminal, however long it takes.

    Raises:
        ConfigError: A setting is wrong, or labels are to be scored without a label set.
        DataError: The data is empty, or a record cannot be used.
        ContextOverflowError: Prompt and row together exceed the model's context.
        OutputExistsError: The file of predictions exists, and ``overwrite`` is off.
    """
    world().from_main(lambda: check_predictions(predictions, overwrite=overwrite))
    if len({each.name for each in baselines}) < len(baselines):
        raise ConfigError(f"{', '.join(each.name for each in baselines)}: two baselines are alike; leave one out")
    several = task_field is not None or not isinstance(task_name, str | int | None)
    if several:
        _check_several(subject, task_field, task_name, baselines)
    else:
        subject = _of_task(subject, cast(TaskName | None, task_name), without_prompt=without_prompt)
    columns = input_field, output_field, label_names
    how = EvaluationSettings(task, without_prompt, batch_size, normalize, engine, *columns, silence_progress_bars)
    how = with_columns(how, [subject])
    if not several and (first := first_prompt(subject)) is not None:
        task_of(first, how)
    every = read_numbered(data, how, limit)
    records = every[:limit]
    if several and isinstance(subject, TunedPrompt):
        names = _tasks_of(records, task_field) if task_field else cast(Sequence[TaskName], task_name)
        report = _by_task(subject, records, names if task_field or len(names) != len(every) else names[:limit], how)
    else:
        subject, own = prompted(subject, every, how)
        report = report_of(subject, records, own)
    if baselines:
        others = {each.name: prompted(each, every, how, first_prompt(subject)) for each in baselines}
        found = {name: report_of(tuned, records, own) for name, (tuned, own) in others.items()}
        report = replace(report, baselines=found)
    if world().is_main:
        write_predictions(predictions, {report.subject: report, **(report.baselines or {})})
    return report


def _of_task(subject: Subject, task: TaskName | None, *, without_prompt: bool) -> Subject:
    if not isinstance(subject, Baseline):
        return subject.of_task(task)
    if task is not None or without_prompt:
        raise ConfigError(
            "task_name and without_prompt are for tuned prompts, and a baseline is none; leave them out"
        )
    return subject


def with_columns(how: EvaluationSettings, subjects: Sequence[Subject]) -> EvaluationSettings:
    """Return the settings with how the data is read: as was given, or as in the tuning of the prompts.

    Raises:
        ConfigError: They were tuned with different columns, or names of labels.
    """
    members = [member for each in subjects for member in _members(each)]
    found: dict[str, Any] = {}
    for option, name in (
        ("input_field", "input_field"),
        ("output_field", "target_field"),
        ("label_names", "label_names"),
    ):
        given, recorded = getattr(how, name), [member.manifest.settings.get(option) for member in members]
        if given is None and len(different := {str(each) for each in recorded}) > 1:
            raise ConfigError(
                f"the prompts were tuned with different {option.removesuffix('s')}s "
                f"({', '.join(sorted(different))}); give {option}"
            )
        found[name] = next(iter(recorded), None) if given is None else given
    return replace(how, **found)


def read_numbered(data: DataSource, how: EvaluationSettings, limit: int | None) -> list[Numbered]:
    """Return all records of the data; raise ``ConfigError`` for a limit below 1."""
    if limit is not None and limit < 1:
        raise ConfigError(f"limit expects at least 1 row, got {limit}")
    records = read_records(
        data, input_field=how.input_field, output_field=how.target_field, label_names=how.label_names, use="test"
    )
    return [Numbered(number, each) for number, each in enumerate(records, start=1)]


def _members(subject: Subject) -> Sequence[TunedPrompt]:
    if isinstance(subject, Baseline):
        return ()
    return subject.members if isinstance(subject, Ensemble) else (subject,)


def first_prompt(subject: Subject) -> TunedPrompt | None:
    """Return the prompt that baselines beside a subject resemble; None for a baseline."""
    return next(iter(_members(subject)), None)


def _check_several(
    subject: Subject, task_field: str | None, task_name: TaskNames | None, baselines: Sequence[Baseline]
) -> None:
    if task_field is not None and task_name is not None:
        raise ConfigError("task_field and task_name both say which task a row is of; give one of them")
    if isinstance(subject, Ensemble):
        raise ConfigError("an ensemble answers for one task at a time; give one task_name")
    if isinstance(subject, Baseline) or baselines:
        raise ConfigError("a baseline answers for one task; give the records of one, and its task_name")


def _by_task(
    tuned: TunedPrompt, records: Sequence[Numbered], names: Sequence[TaskName], how: EvaluationSettings
) -> Report:
    found = tuned.rows_of_tasks(names, len(records))
    parts = {task: [records[i] for i in numbers] for task, numbers in found.items()}
    return joined({tuned.task_names[task]: report_of(tuned.of_task(task), own, how) for task, own in parts.items()})


def _tasks_of(records: Sequence[Numbered], task_field: str) -> list[str]:
    """Return the task that each record names."""
    tasks = []
    for each in records:
        fields = each.record.fields
        if not fields.get(task_field):
            raise DataError(
                f"record {each.number} has no task in {task_field!r}{nearest(task_field, fields)}; "
                "name the column of the records' tasks in task_field (--task-field)"
            )
        tasks.append(fields[task_field])
    return tasks
