"""One report of rows of several tasks, from the reports of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from softprompt.evaluation.report import Report


def joined(reports: Mapping[str, Report]) -> Report:
    """Return the report of all rows, which holds those of the tasks.

    Shares and means are over the rows. What has no meaning across label sets (macro F1, predictions,
    perplexity) is in the tasks' own reports alone.
    """
    parts = list(reports.values())
    kinds = {part.task for part in parts}
    return Report(
        task=parts[0].task if len(kinds) == 1 else "mixed",
        rows=sum(part.rows for part in parts),
        without_prompt=parts[0].without_prompt,
        accuracy=_mean(parts, [part.accuracy for part in parts]),
        exact_match=_mean(parts, [part.exact_match for part in parts]),
        rouge_l=_mean(parts, [part.rouge_l for part in parts]),
        invalid=sum(part.invalid or 0 for part in parts),
        inputs_cut=sum(part.inputs_cut for part in parts),
        targets_cut=sum(part.targets_cut for part in parts),
        tasks=dict(reports),
    )


def _mean(parts: Sequence[Report], values: Sequence[float | None]) -> float | None:
    """Return the mean over the rows; None where a task has no such value."""
    known = [value for value in values if value is not None]
    if len(known) < len(parts):
        return None
    rows = sum(part.rows for part in parts)
    return sum(value * part.rows for value, part in zip(known, parts, strict=True)) / rows
