"""The passes of an evaluation: records answered by a prompt, an ensemble or a base, compared with their targets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor

from softprompt.backbone import replaced_modules
from softprompt.engine import Engine, EngineRow, HeadInput, Predictions, check_rows
from softprompt.errors import ConfigError, ContextOverflowError
from softprompt.evaluation import Outcome, Report, calibration_error, label_metrics, text_metrics
from softprompt.generation import Classified, GenerationOptions, classify_rows, per_token, target_likelihood
from softprompt.inference import Ensemble, TunedPrompt, require_tokens
from softprompt.progress import progress_bar, timed

if TYPE_CHECKING:
    from softprompt.data import LabelNames, Record, TokenRow

Task = Literal["classification", "generation"]

_BATCHES = 8
_BAR_SECONDS = 2.0
"""Seconds after which a progress bar appears."""


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """What holds for the records of every task, and for every prompt that is compared; see ``evaluate``."""

    task: Task | None = None
    without_prompt: bool = False
    batch_size: int = 32
    normalize: bool = False
    engine: str = "auto"
    input_field: str | None = None
    target_field: str | None = None
    label_names: LabelNames | None = None
    silent: bool = False
    baseline: str | None = None


@dataclass(frozen=True, slots=True)
class Numbered:
    """A record of a task, and its number in the data, from 1."""

    number: int
    record: Record


def task_of(tuned: TunedPrompt, how: EvaluationSettings) -> Task:
    """Return how a prompt answers; raise ``ConfigError`` where it cannot, or a setting would be ignored."""
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


def report_of(tuned: TunedPrompt | Ensemble, records: Sequence[Numbered], how: EvaluationSettings) -> Report:
    """Return the report of records that have one task."""
    try:
        with timed(silent=how.silent):
            return _report(tuned, records, how)
    except ContextOverflowError as error:
        if how.baseline is None:
            raise
        advice = "or lower few_shot (--few-shot): the tokens of its text count as virtual ones"
        raise ContextOverflowError(f"{how.baseline} does not fit: {error}, {advice}") from error


def _report(tuned: TunedPrompt | Ensemble, records: Sequence[Numbered], how: EvaluationSettings) -> Report:
    members = tuned.members if isinstance(tuned, Ensemble) else (tuned,)
    chosen = task_of(members[0], how)
    own = [_rows_of(member, records, how.target_field) for member in members]
    engine = members[0].engine_of(how.engine)
    if isinstance(tuned, Ensemble):
        if chosen != "classification":
            raise ConfigError("an ensemble scores labels and generates no text; evaluate its members alone")
        if how.without_prompt:
            raise ConfigError(
                "without_prompt evaluates the base under one prompt's template; name one prompt for it"
            )
        return _ensemble_report(tuned, engine, own, records, how)
    answer = _labelled if chosen == "classification" else _generated
    with replaced_modules(tuned.base, {} if how.without_prompt else tuned.heads):
        return answer(tuned, engine, own[0], records, how)


def _rows_of(member: TunedPrompt, records: Sequence[Numbered], target_field: str | None) -> list[TokenRow]:
    plain = [each.record for each in records]
    member.rows.check(plain, target_field)
    rows, _ = member.rows.tokenize(plain)
    require_tokens([row.source for row in rows])
    return rows


@final
class _Watched(Engine):
    """An engine that moves a progress bar by the rows it has run."""

    def __init__(self, engine: Engine, tuned: TunedPrompt, bar: Any) -> None:
        super().__init__(tuned.base)
        self.name, self._engine, self._bar = engine.name, engine, bar
        self._share = engine.processes.size

    def run_alike(self, rows: Sequence[EngineRow], head: HeadInput | None = None) -> Predictions:
        found = self._engine.run_alike(rows, head)
        _move(self._bar, len(rows) * self._share)
        return found


def _move(bar: Any, count: int) -> None:
    """Count rows of all processes, of which this one has as many as any: the last ones may be fewer."""
    bar.update(min(count, bar.total - bar.n))


def _basics(tuned: TunedPrompt, rows: Sequence[TokenRow], how: EvaluationSettings) -> Report:
    """Return a report of what is known before an answer."""
    return Report(
        task=task_of(tuned, how),
        rows=len(rows),
        without_prompt=how.without_prompt,
        baseline=how.baseline,
        prompt_tokens=0 if how.without_prompt else tuned.prompt().tokens,
        input_tokens=sum(len(row.source) for row in rows) / len(rows),
        inputs_cut=sum(row.source_cut for row in rows),
    )


def _generated(
    tuned: TunedPrompt,
    engine: Engine,
    rows: Sequence[TokenRow],
    records: Sequence[Numbered],
    how: EvaluationSettings,
) -> Report:
    """Generate the answers to some records."""
    prompt = None if how.without_prompt else tuned.prompt()
    begin = time.perf_counter()
    # Like lengths together, and some batches between two steps of the bar, so that none runs half empty for long.
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].source))
    ranks = engine.processes

    def answered(own: Sequence[int]) -> Sequence[str]:
        texts: list[str] = []
        with progress_bar(len(order), "answer", delay=_BAR_SECONDS) as bar:
            for start in range(0, len(own), _BATCHES * how.batch_size):
                part = own[start : start + _BATCHES * how.batch_size]
                answers = tuned.generate_rows(
                    [rows[number].source for number in part],
                    GenerationOptions(max_new_tokens=tuned.manifest.max_target_length),
                    batch_size=how.batch_size,
                    without_prompt=how.without_prompt,
                )
                texts += [answer.text for answer in answers]
                _move(bar, len(part) * ranks.size)
        return texts

    found = dict(zip(order, ranks.split(order, answered), strict=True))
    seconds = time.perf_counter() - begin
    with progress_bar(len(rows), "target", delay=_BAR_SECONDS) as bar:
        likelihood = target_likelihood(_Watched(engine, tuned, bar), rows, prompt, batch_size=how.batch_size)
    texts, targets = [found[number] for number in range(len(rows))], [str(each.record.target) for each in records]
    metrics = text_metrics(targets, texts, tuned.labels)
    outcomes = [
        Outcome(each.number, each.record.fields, target, text, right, overlap)
        for each, target, text, right, overlap in zip(
            records, targets, texts, metrics.right, metrics.overlaps, strict=True
        )
    ]
    return replace(
        _basics(tuned, rows, how),
        exact_match=metrics.exact_match,
        rouge_l=metrics.rouge_l,
        bleu=metrics.bleu,
        chrf=metrics.chrf,
        intervals=metrics.intervals,
        perplexity=likelihood.perplexity,
        invalid=metrics.invalid,
        targets_cut=sum(row.target_cut for row in rows),
        outcomes=tuple(outcomes),
        seconds=seconds,
    )


def _labelled(
    tuned: TunedPrompt,
    engine: Engine,
    rows: Sequence[TokenRow],
    records: Sequence[Numbered],
    how: EvaluationSettings,
) -> Report:
    """Score the labels of some records."""
    labels = tuned.labels or ()
    label_ids, prompt = tuned.label_ids(labels), None if how.without_prompt else tuned.prompt()
    longest = max(label_ids, key=len)  # what does not fit is refused before hours of passes, not at their end
    check_rows(tuned.base, [EngineRow(row.source, longest, prompt, row.at) for row in rows])
    begin = time.perf_counter()
    with progress_bar(len(rows) * len(labels), "label", delay=_BAR_SECONDS) as bar:
        found = classify_rows(
            _Watched(engine, tuned, bar),
            rows,
            label_ids,
            prompt,
            batch_size=how.batch_size,
            normalize=how.normalize,
        )
    seconds = time.perf_counter() - begin
    ranks = per_token(found.scores, found.label_tokens) if how.normalize else found.scores
    basics = replace(_basics(tuned, rows, how), seconds=seconds)
    return _label_report(basics, found, torch.softmax(ranks, dim=1), records, labels)


def _label_report(
    basics: Report, found: Classified, shares: Tensor, records: Sequence[Numbered], labels: Sequence[str]
) -> Report:
    """Compare the labels found for some records, and their shares ``[N, K]``, with the gold ones."""
    gold = [str(each.record.target) for each in records]
    metrics = label_metrics(gold, [labels[k] for k in found.predicted], labels)
    numbers = {label: k for k, label in enumerate(labels)}
    likelihood = found.likelihood([numbers.get(label) for label in gold])
    outcomes = [
        Outcome(
            each.number,
            each.record.fields,
            target,
            labels[best],
            labels[best] == target,
            own[best],
            dict(zip(labels, own, strict=True)),
        )
        for each, target, best, own in zip(records, gold, found.predicted, shares.tolist(), strict=True)
    ]
    return replace(
        basics,
        accuracy=metrics.accuracy,
        macro_f1=metrics.macro_f1,
        mcc=metrics.mcc,
        calibration_error=calibration_error([each.score for each in outcomes], [each.right for each in outcomes]),
        intervals=metrics.intervals,
        perplexity=likelihood.perplexity if likelihood.tokens else None,
        invalid=metrics.invalid,
        collapsed=metrics.collapsed,
        predictions=metrics.predictions,
        per_label=metrics.per_label,
        confusion=metrics.confusion,
        outcomes=tuple(outcomes),
    )


def _ensemble_report(
    ensemble: Ensemble,
    engine: Engine,
    rows: Sequence[Sequence[TokenRow]],
    records: Sequence[Numbered],
    how: EvaluationSettings,
) -> Report:
    """Score the records under every member's template once, and report the ensemble beside its members."""
    begin = time.perf_counter()
    with progress_bar(len(rows) * len(records) * len(ensemble.labels), "label", delay=_BAR_SECONDS) as bar:
        scores = ensemble.scores(
            [[row.source for row in own] for own in rows],
            engine=_Watched(engine, ensemble.members[0], bar),
            batch_size=how.batch_size,
        )
    seconds = time.perf_counter() - begin
    ranked = ensemble.ranked(scores) if how.normalize else scores
    reports = []
    for member, own, raw, ranks, label_ids in zip(
        ensemble.members, rows, scores, ranked, ensemble.label_ids(), strict=True
    ):
        tokens = tuple(len(ids) for ids in label_ids)
        found = Classified(raw, tokens, tuple(ranks.argmax(dim=1).tolist()))
        basics = _basics(member, own, how)
        reports.append(_label_report(basics, found, torch.softmax(ranks, dim=1), records, ensemble.labels))
    answer = ensemble.combined(ranked)
    together = Classified(answer.scores, (1,) * len(ensemble.labels), answer.predicted)
    basics = replace(
        reports[0],
        prompt_tokens=sum(each.prompt_tokens for each in reports),
        inputs_cut=max(each.inputs_cut for each in reports),
        combine=ensemble.combine,
        members=dict(zip(ensemble.names, reports, strict=True)),
        seconds=seconds,
    )
    report = _label_report(basics, together, answer.shares, records, ensemble.labels)
    # A mean of log-probabilities over several prompts is no distribution over texts.
    return replace(report, perplexity=None)
