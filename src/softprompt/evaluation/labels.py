"""Reports of scored labels: of one prompt, and of an ensemble beside its members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from softprompt.data import TokenRow
from softprompt.engine import Engine
from softprompt.evaluation.likelihood import Classified
from softprompt.evaluation.metrics import label_metrics
from softprompt.evaluation.report import Report
from softprompt.inference import Ensemble


def label_report(
    found: Classified,
    rows: Sequence[TokenRow],
    gold: Sequence[str],
    labels: Sequence[str],
    *,
    without_prompt: bool = False,
) -> Report:
    """Compare the labels found for some rows with the gold ones."""
    metrics = label_metrics(gold, [labels[k] for k in found.predicted], labels)
    places = {label: k for k, label in enumerate(labels)}
    likelihood = found.likelihood([places.get(label) for label in gold])
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


def ensemble_report(
    ensemble: Ensemble,
    engine: Engine,
    rows: Sequence[Sequence[TokenRow]],
    gold: Sequence[str],
    *,
    batch_size: int,
    normalize: bool,
) -> Report:
    """Score the rows under every member once, and report the ensemble beside its members.

    Args:
        ensemble: The prompts.
        engine: Scores targets after sources.
        rows: For each member the same inputs under its template.
        gold: The label of each input.
        batch_size: (member, input, label) triples in one pass, at most.
        normalize: Divide a label's log-probability by its token count.
    """
    sources = [[row.source for row in own] for own in rows]
    scores = ensemble.scores(sources, engine=engine, batch_size=batch_size)
    ranked = ensemble.ranked(scores) if normalize else scores
    reports = []
    for own, raw, ranks, label_ids in zip(rows, scores, ranked, ensemble.label_ids(), strict=True):
        tokens = tuple(len(ids) for ids in label_ids)
        found = Classified(raw, tokens, tuple(ranks.argmax(dim=1).tolist()))
        reports.append(label_report(found, own, gold, ensemble.labels))
    answer = ensemble.combined(ranked)
    together = Classified(answer.scores, (1,) * len(ensemble.labels), answer.predicted)
    report = label_report(together, rows[0], gold, ensemble.labels)
    return replace(
        report,
        # A mean of log-probabilities over several prompts is no distribution over texts.
        perplexity=None,
        inputs_cut=max(each.inputs_cut for each in reports),
        combine=ensemble.combine,
        members=dict(zip(ensemble.names, reports, strict=True)),
    )
