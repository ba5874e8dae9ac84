"""The outcome of an evaluation: plain numbers, as JSON or as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from softprompt.display import one_line, page, report_figure, table
from softprompt.evaluation.metrics import LabelRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABELS_SHOWN = 20
_SHARES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "mcc": "MCC",
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
}
"""Metrics that share an axis from 0 to 1, and what a figure calls them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How good a prompt, or its base alone, is on some records; None is not applicable.

    Attributes:
        task: "classification" scores the label set, "generation" generates text, "mixed" is tasks of both kinds.
        rows: Records evaluated.
        without_prompt: Whether the base was evaluated with the template alone.
        accuracy: Share of records with the right label.
        macro_f1: Mean F1 over the labels that occur in gold or predictions.
        exact_match: Share of generated answers equal to the target, outer white space aside.
        rouge_l: Mean ROUGE-L F-measure of the generated answers.
        perplexity: Of the target tokens; for labels, over the records whose gold label is scored.
        invalid: Gold labels, or generated answers, outside the label set; such a label counts as wrong.
        inputs_cut: Rows whose input exceeded the prompt's limit and lost its end.
        targets_cut: Rows whose target exceeded the prompt's limit and lost its end.
        collapsed: Whether over 95 % of the predictions are one label though gold is not.
        predictions: Rows by predicted label, every label of the set named.
        per_label: Counts and rates of each label of the set, then of gold labels outside it.
        confusion: Rows by gold label, then by predicted label; zero counts are left out.
        combine: How the members of an ensemble were combined; None for one prompt.
        members: The report of each member of an ensemble by its name, on the same records.
        tasks: The report of each task by its name, on the task's records, where records have several.
    """

    task: Literal["classification", "generation", "mixed"]
    rows: int
    without_prompt: bool
    accuracy: float | None = None
    macro_f1: float | None = None
    exact_match: float | None = None
    rouge_l: float | None = None
    perplexity: float | None = None
    invalid: int | None = None
    inputs_cut: int = 0
    targets_cut: int = 0
    collapsed: bool | None = None
    predictions: Mapping[str, int] | None = None
    per_label: tuple[LabelRow, ...] | None = None
    confusion: Mapping[str, Mapping[str, int]] | None = None
    combine: str | None = None
    members: Mapping[str, Report] | None = None
    tasks: Mapping[str, Report] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a number that is not finite becomes None."""
        values = {name: _finite(value) for name, value in asdict(self).items()}
        if self.per_label is not None:
            values["per_label"] = [asdict(row) for row in self.per_label]
        for part in ("members", "tasks"):
            own: Mapping[str, Report] | None = getattr(self, part)
            if own is not None:
                values[part] = {name: each.to_dict() for name, each in own.items()}
        return values

    def __str__(self) -> str:
        """Return a table for people."""
        subject = "base without prompt" if self.without_prompt else "tuned prompt"
        if self.members is not None:
            subject = f"ensemble of {len(self.members)} prompts by {self.combine}"
        lines = [f"{subject}, {self.task}, {self.rows:,} rows"]
        numbers = {
            "accuracy": self.accuracy,
            "macro F1": self.macro_f1,
            "exact match": self.exact_match,
            "ROUGE-L": self.rouge_l,
            "perplexity": self.perplexity,
        }
        lines += [f"  {name:<12} {value:>10.4f}" for name, value in numbers.items() if value is not None]
        counts = {
            "invalid": self.invalid,
            "inputs cut": self.inputs_cut or None,
            "targets cut": self.targets_cut or None,
        }
        lines += [f"  {name:<12} {value:>10,}" for name, value in counts.items() if value is not None]
        lines += [*self._member_lines(), *self._task_lines(), *self._label_lines()]
        if self.collapsed:
            lines.append("  collapsed: over 95 % of the predictions are one label")
        return "\n".join(lines)

    def __repr__(self) -> str:
        """Return task, size and numbers in one line."""
        return one_line("Report", self.task, f"{self.rows:,} rows", **self._numbers())

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the numbers, and the table of labels."""
        head = ("label", "support", "predicted", "precision", "recall", "f1")
        rows = [[getattr(row, name) for name in head] for row in self.per_label or ()]
        parts = {**(self.members or {}), **(self.tasks or {})}
        names = list(dict.fromkeys(name for each in parts.values() for name in each._numbers()))
        own = [[name, *(each._numbers().get(name, "") for name in names)] for name, each in parts.items()]
        title = "Base without prompt" if self.without_prompt else "Tuned prompt"
        facts = table({"task": self.task, "rows": self.rows, **self._numbers()})
        return page(title, facts, table(own, ("", *names)), table(rows, head))

    def plot(self) -> Figure:
        """Return a figure: the confusion matrix of labels, or bars of the metrics; its ``savefig`` writes it.

        Raises:
            ConfigError: There is nothing to draw, or matplotlib (extra ``plot``) is not installed.
        """
        parts = {**(self.members or {}), **(self.tasks or {})} or {"": self}
        bars = {name: each._shares() for name, each in parts.items()}
        title = ", ".join(
            [f"{self.rows:,} records", *(f"{key} {value:.3f}" for key, value in self._shares().items())]
        )
        labels = [row.label for row in self.per_label or ()]
        return report_figure(title, bars, None if self.members else self.confusion, labels)

    def _shares(self) -> dict[str, float]:
        """Return the metrics between 0 and 1, by what a figure calls them."""
        return {_SHARES[name]: value for name, value in self._numbers().items() if name in _SHARES}

    def _numbers(self) -> dict[str, float]:
        """Return the metrics that apply, by the names of their fields."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, float)}

    def _member_lines(self) -> list[str]:
        rows = [
            (name, f"{each.accuracy or 0.0:>8.4f}  {each.macro_f1 or 0.0:>8.4f}")
            for name, each in (self.members or {}).items()
        ]
        return _table("member", "accuracy  macro F1", rows)

    def _task_lines(self) -> list[str]:
        rows = []
        for name, each in (self.tasks or {}).items():
            numbers = "".join(
                f"{'-' if value is None else f'{value:.4f}':>{size}}"
                for value, size in ((each.accuracy, 10), (each.exact_match, 13))
            )
            rows.append((name, f"{each.rows:>7,}{numbers}"))
        return _table("task", "   rows  accuracy  exact match", rows)

    def _label_lines(self) -> list[str]:
        found, title = list(self.per_label or ()), "label"
        if len(found) > _LABELS_SHOWN:
            found = sorted(found, key=lambda row: row.f1)[:_LABELS_SHOWN]
            title = f"label ({_LABELS_SHOWN} lowest F1)"
        rows = [
            (
                row.label,
                f"{row.support:>7,}  {row.predicted:>9,}"
                f"  {row.precision:>9.4f}  {row.recall:>6.4f}  {row.f1:>6.4f}",
            )
            for row in found
        ]
        return _table(title, "support  predicted  precision  recall      F1", rows)


def _table(title: str, head: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    """Return the lines of a table with a name and its numbers in each; none without rows."""
    width = max([len(title), *(len(name) for name, _ in rows)])
    lines = [f"  {name:<{width}}  {numbers}" for name, numbers in [(title, head), *rows]]
    return lines if rows else []


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def joined(reports: Mapping[str, Report]) -> Report:
    """Return the report of all records, which holds those of the tasks.

    Shares and means are over the records. What has no meaning across label sets (macro F1, predictions,
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
    """Return the mean over the records; None where a task has no such value."""
    known = [value for value in values if value is not None]
    if len(known) < len(parts):
        return None
    rows = sum(part.rows for part in parts)
    return sum(value * part.rows for value, part in zip(known, parts, strict=True)) / rows
