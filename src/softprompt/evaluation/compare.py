"""Prompts against each other on the same records: who wins where, and whether that may be chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binomtest

from softprompt.errors import ConfigError
from softprompt.evaluation import (
    Baseline,
    EvaluationSettings,
    Report,
    check_predictions,
    first_prompt,
    interval_text,
    intervals,
    numbers_table,
    prompted,
    read_numbered,
    report_of,
    text_table,
    with_columns,
    write_predictions,
)
from softprompt.world import world

if TYPE_CHECKING:
    from softprompt.data import DataSource, LabelNames
    from softprompt.evaluation.evaluate import Subject
    from softprompt.evaluation.metrics import Interval
    from softprompt.evaluation.passes import Task
    from softprompt.inference import Task as TaskName


@dataclass(frozen=True, slots=True)
class Paired:
    """One prompt against the first one, record by record.

    Attributes:
        won: Records that it has right and the first has not; for texts, those with a higher ROUGE-L.
        lost: Records the other way round.
        difference: Its accuracy, or mean ROUGE-L, less that of the first.
        interval: 95 % interval of the difference, from a paired bootstrap over the records.
        p_value: Of an exact binomial test of won against lost: McNemar's exact test, for texts the sign test.
    """

    won: int
    lost: int
    difference: float
    interval: Interval | None
    p_value: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Reports of several prompts on the same records.

    Attributes:
        reports: By name, in the order given.
        against: Each but the first, against the first.
    """

    reports: Mapping[str, Report]
    against: Mapping[str, Paired]

    @property
    def first(self) -> str:
        """The name of the prompt that the others are compared with."""
        return next(iter(self.reports))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; ``seconds_per_record`` is wall time with what shares a batch."""
        return {
            "first": self.first,
            "reports": {
                name: each.to_dict() | {"seconds_per_record": each.seconds / each.rows}
                for name, each in self.reports.items()
            },
            "against_first": {name: asdict(each) for name, each in self.against.items()},
        }

    def __str__(self) -> str:
        """Return a table of the prompts, and one of the differences, for people."""
        reports = list(self.reports.values())
        costs = {
            "input tokens": [f"{each.input_tokens:.1f}" for each in reports],
            "ms / record": [f"{1000 * each.seconds / each.rows:.2f}" for each in reports],
        }
        if len({each.prompt_tokens for each in reports}) == 1:
            costs = {"prompt tokens": [f"{each.prompt_tokens:,}" for each in reports], **costs}
        rows = [
            (
                name,
                f"{each.difference:+.4f}",
                interval_text(each.interval),
                f"{each.won:,}",
                f"{each.lost:,}",
                "< 0.0001" if each.p_value < 1e-4 else f"{each.p_value:.4f}",
            )
            for name, each in self.against.items()
        ]
        return "\n".join(
            [
                f"{reports[0].task}, {reports[0].rows:,} records",
                *numbers_table("", self.reports, **costs),
                *text_table((f"against {self.first}", "difference", "95 %", "won", "lost", "p"), rows),
            ]
        )


def compare(
    subjects: Mapping[str, Subject] | Sequence[Subject],
    data: DataSource,
    *,
    batch_size: int = 32,
    input_field: str | None = None,
    output_field: str | None = None,
    label_names: LabelNames | None = None,
    task: Task | None = None,
    task_name: TaskName | None = None,
    limit: int | None = None,
    normalize: bool = False,
    engine: str = "auto",
    predictions: str | Path | None = None,
    overwrite: bool = False,
    silence_progress_bars: bool = False,
) -> Comparison:
    """Evaluate prompts, ensembles and baselines on the same records, and compare each with the first.

    Baselines without a base of their own are of the first prompt's base and template.

    Args:
        subjects: Two or more, by name; in a list baselines have names, prompts are numbered from 1.
        data: A path, or records; read as in training.
        batch_size: As for ``evaluate``.
        input_field: As for ``evaluate``.
        output_field: As for ``evaluate``.
        label_names: As for ``evaluate``.
        task: As for ``evaluate``.
        task_name: The task of the prompts that have several.
        limit: As for ``evaluate``.
        normalize: As for ``evaluate``.
        engine: As for ``evaluate``.
        predictions: File that gets the outcome of each record with each prompt, as JSON lines.
        overwrite: Replace that file where it exists.
        silence_progress_bars: As for ``evaluate``.

    Raises:
        SoftPromptError: As ``evaluate``.
        ConfigError: There are fewer than two, or they differ in their label sets, or in labels against texts.
    """
    world().from_main(lambda: check_predictions(predictions, overwrite=overwrite))
    named = _named(subjects, task_name)
    how = EvaluationSettings(
        task, False, batch_size, normalize, engine, input_field, output_field, label_names, silence_progress_bars
    )
    how = with_columns(how, list(named.values()))
    every = read_numbered(data, how, limit)
    records = every[:limit]
    like = next((first for each in named.values() if (first := first_prompt(each)) is not None), None)
    ready = {}
    for name, each in named.items():
        ready[name] = prompted(each, every, how, like)
        like = like or first_prompt(ready[name][0])
    # What a first pass sets up is no part of the time of the others, and shows what cannot be compared.
    _check_alike({name: report_of(tuned, records[:1], own) for name, (tuned, own) in ready.items()})
    reports = {name: report_of(tuned, records, own) for name, (tuned, own) in ready.items()}
    one, *others = reports
    if world().is_main:
        write_predictions(predictions, reports)
    return Comparison(reports, {name: _paired(reports[one], reports[name]) for name in others})


def _named(subjects: Mapping[str, Subject] | Sequence[Subject], task: TaskName | None) -> dict[str, Subject]:
    if isinstance(subjects, Mapping):
        pairs = list(subjects.items())
    else:
        pairs = [
            (each.name if isinstance(each, Baseline) else str(number), each)
            for number, each in enumerate(subjects, start=1)
        ]
    if len(pairs) < 2 or len(dict(pairs)) < len(pairs):
        raise ConfigError(
            f"compare expects two prompts or more, each with a name of its own, got {len(pairs)}: "
            f"{', '.join(name for name, _ in pairs) or 'none'}"
        )
    found = {name: _of_task(each, task) for name, each in pairs}
    if task is not None and all(found[name] is each for name, each in pairs):
        raise ConfigError(f"the task {task!r} would be ignored, as no prompt has several; leave it out")
    return found


def _of_task(subject: Subject, task: TaskName | None) -> Subject:
    first = first_prompt(subject)
    if isinstance(subject, Baseline) or first is None or first.module.num_tasks < 2:
        return subject
    return subject.of_task(task)


def _check_alike(reports: Mapping[str, Report]) -> None:
    """Refuse prompts that do not give the same kind of answers."""
    (first, one), *others = reports.items()
    for name, each in others:
        if one.task != each.task:
            raise ConfigError(
                f"{first} answers by {one.task} and {name} by {each.task}; give one task for both (--task)"
            )
        if odd := sorted({*(one.predictions or ())} ^ {*(each.predictions or ())}):
            raise ConfigError(
                f"{first} and {name} have different label sets, which differ in {', '.join(map(repr, odd))}; "
                "compare prompts of one label set"
            )


def _paired(first: Report, other: Report) -> Paired:
    ours, theirs = (
        np.array([each.right if report.task == "classification" else each.score for each in report.outcomes], float)
        for report in (other, first)
    )
    won, lost = int((ours > theirs).sum()), int((ours < theirs).sum())
    found = intervals([ours - theirs], np.mean)
    return Paired(
        won=won,
        lost=lost,
        difference=float((ours - theirs).mean()),
        interval=found[0] if found else None,
        p_value=float(binomtest(won, won + lost).pvalue) if won + lost else 1.0,
    )
