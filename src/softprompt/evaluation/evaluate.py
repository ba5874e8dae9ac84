"""Evaluating a prompt, or its base alone, on rows that were not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from softprompt.data.records import Example, Rows, read_examples
from softprompt.data.tokens import TokenRow
from softprompt.engine.rows import Engine
from softprompt.errors import ConfigError, DataError
from softprompt.evaluation.likelihood import classify_rows, target_likelihood
from softprompt.evaluation.metrics import label_metrics, text_metrics
from softprompt.evaluation.report import Report
from softprompt.inference.options import GenerationOptions
from softprompt.inference.requests import require_tokens
from softprompt.inference.task_choice import Task as TaskName
from softprompt.inference.tuned import TunedPrompt

Task = Literal["classification", "generation"]


def evaluate(
    tuned: TunedPrompt,
    data: Rows,
    *,
    without_prompt: bool = False,
    batch_size: int = 32,
    input_field: str | None = None,
    output_field: str | None = None,
    task: Task | None = None,
    task_name: TaskName | None = None,
    limit: int | None = None,
    normalize: bool = False,
    engine: str = "auto",
) -> Report:
    """Evaluate a prompt on every row of ``data``.

    Labels are scored over the prompt's label set; free text is generated greedily, with at
    most ``max_target_length`` tokens, and compared with the target.

    Args:
        tuned: The prompt with its model.
        data: A path, or rows; read as in training.
        without_prompt: Evaluate the base with the template alone.
        batch_size: Rows, or (row, label) pairs, in one pass.
        input_field: Input column; None takes the one the prompt was tuned with.
        output_field: Target column; None takes the one the prompt was tuned with.
        task: Overrides the prompt's own task.
        task_name: The task of a multitask prompt, by name or number.
        limit: Rows from the start of ``data`` to evaluate; None is all.
        normalize: Divide a label's log-probability by its token count.
        engine: Path that scores targets; ``auto`` is the fastest exact one.

    Raises:
        ConfigError: A setting is wrong, or labels are to be scored without a label set.
        DataError: The data is empty, or a record cannot be used.
        ContextOverflowError: Prompt and row together exceed the model's context.
    """
    tuned = tuned.of_task(task_name)
    chosen = _chosen_task(tuned, task, normalize)
    recorded = tuned.manifest.settings
    source_field = input_field or recorded.get("input_field")
    target_field = output_field or recorded.get("output_field")
    examples = read_examples(data, input_field=source_field, output_field=target_field)
    examples = _limited(examples, limit)
    tuned.rows.verbalizer.check(examples, target_field)
    rows, _ = tuned.rows.tokenize(examples)
    require_tokens([row.source for row in rows])
    targets = [str(example.target) for example in examples]
    subject = _Subject(tuned, tuned.engine_of(engine), without_prompt, batch_size)
    if chosen == "classification":
        return _classification(subject, rows, targets, normalize)
    return _generation(subject, rows, targets)


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is evaluated: the model behind its prompt, or without."""

    tuned: TunedPrompt
    engine: Engine
    without_prompt: bool
    batch_size: int

    @property
    def prompts(self) -> list[Tensor]:
        return [] if self.without_prompt else self.tuned.prompts()

    @property
    def indices(self) -> dict[str, int]:
        """Where the prompt's parts are in ``prompts``, as the scoring functions take it."""
        if self.without_prompt:
            return {"prompt_index": -1, "decoder_index": -1}
        places = self.tuned.places
        return {
            "prompt_index": places.source_index(0),
            "decoder_index": places.decoder_index(0),
        }


def _chosen_task(tuned: TunedPrompt, task: Task | None, normalize: bool) -> Task:
    chosen = tuned.manifest.task if task is None else task
    if chosen not in ("classification", "generation"):
        raise ConfigError(f"task expects classification or generation, got {chosen!r}")
    if chosen == "classification" and not tuned.labels:
        raise ConfigError(
            "task classification needs a label set, this prompt has none; tune it with task "
            "classification, or evaluate it as generation"
        )
    if chosen == "generation" and normalize:
        raise ConfigError("normalize would be ignored under task generation; leave it out")
    return chosen


def _limited(examples: list[Example], limit: int | None) -> list[Example]:
    if limit is not None and limit < 1:
        raise ConfigError(f"limit expects at least 1 row, got {limit}")
    kept = examples[:limit]
    if not kept:
        raise DataError("evaluation expects at least one row, got none; check the data file")
    return kept


def _classification(
    subject: _Subject, rows: Sequence[TokenRow], gold: Sequence[str], normalize: bool
) -> Report:
    labels = subject.tuned.labels or ()
    found = classify_rows(
        subject.engine,
        subject.prompts,
        rows,
        subject.tuned.label_ids(labels),
        **subject.indices,
        batch_size=subject.batch_size,
        normalize=normalize,
    )
    metrics = label_metrics(gold, [labels[k] for k in found.predicted], labels)
    places = {label: k for k, label in enumerate(labels)}
    likelihood = found.likelihood([places.get(label) for label in gold])
    return Report(
        task="classification",
        rows=len(rows),
        without_prompt=subject.without_prompt,
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


def _generation(subject: _Subject, rows: Sequence[TokenRow], targets: Sequence[str]) -> Report:
    tuned = subject.tuned
    answers = tuned.generate_rows(
        [row.source for row in rows],
        GenerationOptions(max_new_tokens=tuned.manifest.max_target_length),
        batch_size=subject.batch_size,
        without_prompt=subject.without_prompt,
    )
    likelihood = target_likelihood(
        subject.engine,
        subject.prompts,
        rows,
        **subject.indices,
        batch_size=subject.batch_size,
    )
    metrics = text_metrics(targets, [answer.text for answer in answers], tuned.labels)
    return Report(
        task="generation",
        rows=len(rows),
        without_prompt=subject.without_prompt,
        exact_match=metrics.exact_match,
        rouge_l=metrics.rouge_l,
        perplexity=likelihood.perplexity,
        invalid=metrics.invalid,
        inputs_cut=sum(row.source_cut for row in rows),
        targets_cut=sum(row.target_cut for row in rows),
    )
