"""Evaluating a prompt, or its base alone, on records that were not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from softprompt.backbone import replaced_modules
from softprompt.data import DataSource, LabelNames, Record, TokenRow, read_records
from softprompt.engine import Engine
from softprompt.errors import ConfigError, DataError, nearest
from softprompt.evaluation.metrics import label_metrics, text_metrics
from softprompt.evaluation.report import Report, joined
from softprompt.generation import Classified, GenerationOptions, classify_rows, target_likelihood
from softprompt.inference import Ensemble, TaskNames, TunedPrompt, require_tokens
from softprompt.inference import Task as TaskName

Task = Literal["classification", "generation"]


def evaluate(
    tuned: TunedPrompt | Ensemble,
    data: DataSource,
    *,
    without_prompt: bool = False,
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
) -> Report:
    """Evaluate a prompt, or an ensemble of prompts, on every row of ``data``.

    Labels are scored over the prompt's label set; free text is generated greedily, with at
    most ``max_target_length`` tokens, and compared with the target. The report of an ensemble
    holds those of its members.

    Args:
        tuned: The prompt with its model, or an ensemble.
        data: A path, or records; read as in training.
        without_prompt: Evaluate the base with the template alone.
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

    Raises:
        ConfigError: A setting is wrong, or labels are to be scored without a label set.
        DataError: The data is empty, or a record cannot be used.
        ContextOverflowError: Prompt and row together exceed the model's context.
    """
    several = task_field is not None or not isinstance(task_name, str | int | None)
    if several:
        _check_several(tuned, task_field, task_name)
    else:
        tuned = tuned.of_task(cast(TaskName | None, task_name))
    members = tuned.members if isinstance(tuned, Ensemble) else (tuned,)
    source_field = _recorded("input_field", members, input_field)
    target_field = _recorded("output_field", members, output_field)
    how = _Settings(task, without_prompt, batch_size, normalize, engine, target_field)
    if not several:
        _chosen_task(members[0], how)
    names = _recorded("label_names", members, label_names)
    examples = read_records(
        data, input_field=source_field, output_field=target_field, label_names=names, use="test"
    )
    kept = _limited(examples, limit)
    if several and isinstance(tuned, TunedPrompt):
        names = _tasks_of(kept, task_field) if task_field else cast(Sequence[TaskName], task_name)
        if not task_field and len(names) == len(examples):
            names = names[: len(kept)]
        return joined(
            {
                tuned.task_names[number]: _report(tuned.of_task(number), [kept[i] for i in numbers], how)
                for number, numbers in tuned.rows_of_tasks(names, len(kept)).items()
            }
        )
    return _report(tuned, kept, how)


@dataclass(frozen=True, slots=True)
class _Settings:
    """The arguments of ``evaluate`` that hold for the records of every task."""

    task: Task | None
    without_prompt: bool
    batch_size: int
    normalize: bool
    engine: str
    target_field: str | None


def _check_several(tuned: TunedPrompt | Ensemble, task_field: str | None, task_name: TaskNames | None) -> None:
    if task_field is not None and task_name is not None:
        raise ConfigError("task_field and task_name both say which task a row is of; give one of them")
    if isinstance(tuned, Ensemble):
        raise ConfigError("an ensemble answers for one task at a time; give one task_name")


def _tasks_of(examples: Sequence[Record], task_field: str) -> list[str]:
    """Return the task that each example names."""
    tasks = []
    for number, example in enumerate(examples, start=1):
        if not example.fields.get(task_field):
            raise DataError(
                f"record {number} has no task in {task_field!r}{nearest(task_field, example.fields)}; "
                "name the column of the records' tasks in task_field (--task-field)"
            )
        tasks.append(example.fields[task_field])
    return tasks


def _report(tuned: TunedPrompt | Ensemble, examples: Sequence[Record], how: _Settings) -> Report:
    """Return the report of examples that have one task."""
    members = tuned.members if isinstance(tuned, Ensemble) else (tuned,)
    chosen = _chosen_task(members[0], how)
    rows = [_rows_of(member, examples, how.target_field) for member in members]
    targets = [str(example.target) for example in examples]
    scorer = members[0].engine_of(how.engine)
    if isinstance(tuned, Ensemble):
        _check_ensemble(chosen, how.without_prompt)
        return _ensemble_report(tuned, scorer, rows, targets, how)
    with replaced_modules(tuned.base, {} if how.without_prompt else tuned.heads):
        if chosen == "generation":
            return _generation(tuned, scorer, rows[0], targets, how)
        labels = tuned.labels or ()
        found = classify_rows(
            scorer,
            rows[0],
            tuned.label_ids(labels),
            None if how.without_prompt else tuned.prompt(),
            batch_size=how.batch_size,
            normalize=how.normalize,
        )
    return _label_report(found, rows[0], targets, labels, without_prompt=how.without_prompt)


def _chosen_task(tuned: TunedPrompt, how: _Settings) -> Task:
    chosen = tuned.manifest.task if how.task is None else how.task
    if chosen not in ("classification", "generation"):
        raise ConfigError(f"task expects classification or generation, got {chosen!r}")
    if chosen == "classification" and not tuned.labels:
        raise ConfigError(
            "task classification needs a label set, this prompt has none; tune it with task "
            "classification, or evaluate it as generation"
        )
    if chosen == "generation" and how.normalize:
        raise ConfigError("normalize would be ignored under task generation; leave it out")
    return chosen


def _check_ensemble(task: Task, without_prompt: bool) -> None:
    if task != "classification":
        raise ConfigError("an ensemble scores labels and generates no text; evaluate its members alone")
    if without_prompt:
        raise ConfigError("without_prompt evaluates the base under one prompt's template; name one prompt for it")


def _recorded(name: str, members: Sequence[TunedPrompt], given: Any) -> Any:
    """Return how the data is read: as was given, or as in the tuning of the prompts."""
    if given is not None:
        return given
    recorded = [member.manifest.settings.get(name) for member in members]
    if len(different := {str(each) for each in recorded}) > 1:
        raise ConfigError(
            f"the prompts were tuned with different {name.removesuffix('s')}s ({', '.join(sorted(different))}); "
            f"give {name}"
        )
    return recorded[0]


def _rows_of(member: TunedPrompt, examples: Sequence[Record], target_field: str | None) -> list[TokenRow]:
    member.rows.check(examples, target_field)
    rows, _ = member.rows.tokenize(examples)
    require_tokens([row.source for row in rows])
    return rows


def _limited(examples: list[Record], limit: int | None) -> list[Record]:
    if limit is not None and limit < 1:
        raise ConfigError(f"limit expects at least 1 row, got {limit}")
    kept = examples[:limit]
    if not kept:
        raise DataError("evaluation expects at least one row, got none; check the data file")
    return kept


def _generation(
    tuned: TunedPrompt, engine: Engine, rows: Sequence[TokenRow], targets: Sequence[str], how: _Settings
) -> Report:
    answers = tuned.generate_rows(
        [row.source for row in rows],
        GenerationOptions(max_new_tokens=tuned.manifest.max_target_length),
        batch_size=how.batch_size,
        without_prompt=how.without_prompt,
    )
    prompt = None if how.without_prompt else tuned.prompt()
    metrics = text_metrics(targets, [answer.text for answer in answers], tuned.labels)
    return Report(
        task="generation",
        rows=len(rows),
        without_prompt=how.without_prompt,
        exact_match=metrics.exact_match,
        rouge_l=metrics.rouge_l,
        perplexity=target_likelihood(engine, rows, prompt, batch_size=how.batch_size).perplexity,
        invalid=metrics.invalid,
        inputs_cut=sum(row.source_cut for row in rows),
        targets_cut=sum(row.target_cut for row in rows),
    )


def _label_report(
    found: Classified,
    rows: Sequence[TokenRow],
    gold: Sequence[str],
    labels: Sequence[str],
    *,
    without_prompt: bool = False,
) -> Report:
    """Compare the labels found for some records with the gold ones."""
    metrics = label_metrics(gold, [labels[k] for k in found.predicted], labels)
    numbers = {label: k for k, label in enumerate(labels)}
    likelihood = found.likelihood([numbers.get(label) for label in gold])
    return Report(
        task="classification",
        rows=len(rows),
        without_prompt=without_prompt,
        accuracy=metrics.accuracy,
        macro_f1=metrics.macro_f1,
        perplexity=likelihood.perplexity if likelihood.tokens else None,
        invalid=metrics.invalid,
        inputs_cut=sum(row.source_cut for row in rows),
        collapsed=metrics.collapsed,
        predictions=metrics.predictions,
        per_label=metrics.per_label,
        confusion=metrics.confusion,
    )


def _ensemble_report(
    ensemble: Ensemble, engine: Engine, rows: Sequence[Sequence[TokenRow]], gold: Sequence[str], how: _Settings
) -> Report:
    """Score the records under every member's template once, and report the ensemble beside its members."""
    sources = [[row.source for row in own] for own in rows]
    scores = ensemble.scores(sources, engine=engine, batch_size=how.batch_size)
    ranked = ensemble.ranked(scores) if how.normalize else scores
    reports = []
    for own, raw, ranks, label_ids in zip(rows, scores, ranked, ensemble.label_ids(), strict=True):
        tokens = tuple(len(ids) for ids in label_ids)
        found = Classified(raw, tokens, tuple(ranks.argmax(dim=1).tolist()))
        reports.append(_label_report(found, own, gold, ensemble.labels))
    answer = ensemble.combined(ranked)
    together = Classified(answer.scores, (1,) * len(ensemble.labels), answer.predicted)
    report = _label_report(together, rows[0], gold, ensemble.labels)
    return replace(
        report,
        # A mean of log-probabilities over several prompts is no distribution over texts.
        perplexity=None,
        inputs_cut=max(each.inputs_cut for each in reports),
        combine=ensemble.combine,
        members=dict(zip(ensemble.names, reports, strict=True)),
    )
