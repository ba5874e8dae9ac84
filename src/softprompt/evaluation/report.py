"""What an evaluation found: plain numbers, as JSON or as a table, and what became of each record."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from softprompt.artifacts import require_new_file, write_atomically
from softprompt.display import one_line, page, report_figure, table
from softprompt.evaluation.metrics import Interval, LabelRow, mean_intervals

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABELS_SHOWN, _MATRIX_SHOWN, _SAMPLES_SHOWN, _SAMPLE_WIDTH = 20, 12, 3, 72
_NUMBERS = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "mcc": "MCC",
    "calibration_error": "ECE",
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "perplexity": "perplexity",
}
"""The numbers of a report, and what tables call them."""
_SHARES = ("accuracy", "macro_f1", "mcc", "exact_match", "rouge_l")
"""Those that share an axis up to 1."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one record.

    Attributes:
        record: Its number in the data, from 1.
        fields: Its columns but the target.
        target: The wanted answer.
        answer: The predicted label, or the generated text.
        right: Whether the two are equal, white space at either end of a generated text aside.
        score: Probability of the predicted label, or ROUGE-L F-measure of a generated text.
        probabilities: Of each label; None for texts.
        task: The record's task, where records have several.
    """

    record: int
    fields: Mapping[str, str]
    target: str
    answer: str
    right: bool
    score: float
    probabilities: Mapping[str, float] | None = None
    task: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without those that do not apply."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How a prompt, or its base alone, did on some records; None where a metric does not apply.

    Attributes:
        task: How the records were answered; mixed where their tasks differ in it.
        rows: Number of records.
        without_prompt: Whether the base ran with the template alone.
        baseline: What stood there instead of a tuned prompt; None for a tuned prompt.
        prompt_tokens: Virtual tokens, or tokens of a baseline's text, that stand before each input.
        input_tokens: Mean tokens of an input, those of the template included.
        accuracy: Share of records with the right label.
        macro_f1: Mean F1 over the labels that occur in gold or predictions.
        mcc: Matthews' correlation of gold and predicted labels, from -1 to 1; 0 is chance.
        calibration_error: Expected calibration error (ECE) of the probabilities of the predicted labels.
        exact_match: Share of generated answers equal to the target, outer white space aside.
        rouge_l: Mean ROUGE-L F-measure of the generated answers.
        bleu: Corpus BLEU of the generated answers, 0 to 100; None without ``sacrebleu`` (extra ``metrics``).
        chrf: Corpus chrF of the generated answers, 0 to 100; likewise.
        perplexity: Of the target tokens; for labels, over the records whose gold label is scored.
        intervals: 95 % confidence intervals by metric, from a bootstrap over the records.
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
        baselines: The report of each baseline by its name, on the same records.
        outcomes: What became of each record, in the order of the data; in neither JSON nor comparisons.
        seconds: Wall time in which the records were answered; likewise.
    """

    task: Literal["classification", "generation", "mixed"]
    rows: int
    without_prompt: bool
    baseline: str | None = None
    prompt_tokens: int = 0
    input_tokens: float = 0.0
    accuracy: float | None = None
    macro_f1: float | None = None
    mcc: float | None = None
    calibration_error: float | None = None
    exact_match: float | None = None
    rouge_l: float | None = None
    bleu: float | None = None
    chrf: float | None = None
    perplexity: float | None = None
    intervals: Mapping[str, Interval] = field(default_factory=dict)
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
    baselines: Mapping[str, Report] | None = None
    outcomes: tuple[Outcome, ...] = field(default=(), repr=False, compare=False)
    seconds: float = field(default=0.0, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a number that is not finite becomes None."""
        values = {name: _finite(value) for name, value in asdict(replace(self, outcomes=())).items()}
        del values["outcomes"], values["seconds"]
        values["intervals"] = {name: list(ends) for name, ends in self.intervals.items()}
        if self.per_label is not None:
            values["per_label"] = [asdict(row) for row in self.per_label]
        for part in ("members", "tasks", "baselines"):
            own: Mapping[str, Report] | None = getattr(self, part)
            if own is not None:
                values[part] = {name: each.to_dict() for name, each in own.items()}
        return values

    @property
    def subject(self) -> str:
        """What was evaluated, in words."""
        if self.members is not None:
            return f"ensemble of {len(self.members)} prompts by {self.combine}"
        return self.baseline or ("base without prompt" if self.without_prompt else "tuned prompt")

    def __str__(self) -> str:
        """Return a table for people."""
        lines = [f"{self.subject}, {self.task}, {self.rows:,} rows"]
        for name, title in _NUMBERS.items():
            if (value := getattr(self, name)) is not None:
                lines.append(f"  {title:<12} {value:>10.4f}  {interval_text(self.intervals.get(name))}".rstrip())
        counts = {
            "invalid": self.invalid,
            "inputs cut": self.inputs_cut or None,
            "targets cut": self.targets_cut or None,
        }
        lines += [f"  {name:<12} {value:>10,}" for name, value in counts.items() if value is not None]
        lines += [*self._label_lines(), *self._matrix_lines(), *self._sample_lines()]
        for title, reports in (("member", self.members), ("task", self.tasks)):
            lines += numbers_table(title, reports or {})
        if self.baselines:
            lines += numbers_table("", {self.subject: self, **self.baselines})
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
        parts = {**(self.members or {}), **(self.tasks or {}), **(self.baselines or {})}
        names = list(dict.fromkeys(name for each in parts.values() for name in each._numbers()))
        own = [[name, *(each._numbers().get(name, "") for name in names)] for name, each in parts.items()]
        title = self.subject[:1].upper() + self.subject[1:]
        facts = table({"task": self.task, "rows": self.rows, **self._numbers()})
        return page(title, facts, table(own, ("", *names)), table(rows, head))

    def plot(self) -> Figure:
        """Return a figure: the confusion matrix of labels, or bars of the metrics; its ``savefig`` writes it.

        Raises:
            ConfigError: There is nothing to draw, or matplotlib (extra ``plot``) is not installed.
        """
        parts = {**(self.members or {}), **(self.tasks or {}), **(self.baselines or {})} or {"": self}
        bars = {name: each._shares() for name, each in parts.items()}
        title = ", ".join(
            [f"{self.rows:,} records", *(f"{key} {value:.3f}" for key, value in self._shares().items())]
        )
        labels = [row.label for row in self.per_label or ()]
        return report_figure(title, bars, None if self.members else self.confusion, labels)

    def _shares(self) -> dict[str, float]:
        """Return the metrics between 0 and 1, by what a figure calls them."""
        return {_NUMBERS[name]: value for name, value in self._numbers().items() if name in _SHARES}

    def _numbers(self) -> dict[str, float]:
        """Return the metrics that apply, by the names of their fields."""
        return {name: value for name in _NUMBERS if (value := getattr(self, name)) is not None}

    def _label_lines(self) -> list[str]:
        found, title = list(self.per_label or ()), "label"
        if len(found) > _LABELS_SHOWN:
            found = sorted(found, key=lambda row: row.f1)[:_LABELS_SHOWN]
            title = f"label ({_LABELS_SHOWN} lowest F1)"
        rows = [
            (
                each.label,
                *(f"{count:,}" for count in (each.support, each.predicted)),
                *(f"{value:.4f}" for value in (each.precision, each.recall, each.f1)),
            )
            for each in found
        ]
        return text_table((title, "support", "predicted", "precision", "recall", "F1"), rows)

    def _matrix_lines(self) -> list[str]:
        """Return the confusion matrix, a line for each gold label, where it fits a terminal."""
        labels = [row.label for row in self.per_label or ()]
        if not self.confusion or len(labels) > _MATRIX_SHOWN:
            return []
        numbers = [f"#{number}" for number in range(1, len(labels) + 1)]
        rows = [
            (f"{number} {gold}", *(f"{self.confusion.get(gold, {}).get(got, 0):,}" for got in labels))
            for number, gold in zip(numbers, labels, strict=True)
        ]
        return text_table(("gold \\ predicted", *numbers), rows)

    def _sample_lines(self) -> list[str]:
        """Return a few generated texts between their inputs and targets."""
        if self.task != "generation":
            return []
        return [
            line
            for each in self.outcomes[:_SAMPLES_SHOWN]
            for line in (
                f"  record {each.record}: {_short(' | '.join(dict.fromkeys(each.fields.values())))}",
                f"    answer: {_short(each.answer)}",
                "    as wanted" if each.right else f"    target: {_short(each.target)}",
            )
        ]


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, names to the left and numbers to the right; none without rows."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for first, *others in [head, *rows]:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(["", f"{first:<{widths[0]}}", *cells]))
    return lines if rows else []


def numbers_table(title: str, reports: Mapping[str, Report], **more: Sequence[str]) -> list[str]:
    """Return a table of the numbers of several reports, and of ``more`` columns by their names."""
    if not reports:
        return []
    columns: list[tuple[str, Sequence[str]]] = []
    if len({each.rows for each in reports.values()}) > 1:
        columns.append(("rows", [f"{each.rows:,}" for each in reports.values()]))
    for name, head in _NUMBERS.items():
        values = [getattr(each, name) for each in reports.values()]
        if any(value is not None for value in values):
            columns.append((head, ["-" if value is None else f"{value:.4f}" for value in values]))
        if name in ("accuracy", "rouge_l") and any(name in each.intervals for each in reports.values()):
            columns.append(("95 %", [interval_text(each.intervals.get(name)) for each in reports.values()]))
    if len({each.prompt_tokens for each in reports.values()}) > 1:
        columns.append(("prompt tokens", [f"{each.prompt_tokens:,}" for each in reports.values()]))
    heads, cells = zip(*columns, *more.items(), strict=True)
    return text_table((title, *heads), list(zip(reports, *cells, strict=True)))


def interval_text(interval: Interval | None) -> str:
    """Return an interval as tables show it."""
    return "" if interval is None else "[{:.4f}, {:.4f}]".format(*interval)


def check_predictions(path: str | Path | None, *, overwrite: bool) -> None:
    """Raise ``OutputExistsError`` where a file of predictions would replace another one."""
    if path is not None:
        require_new_file(Path(path), overwrite=overwrite)


def write_predictions(path: str | Path | None, reports: Mapping[str, Report]) -> None:
    """Write what became of each record as JSON lines, those of several prompts with the name of each."""
    if path is None:
        return
    several = len(reports) > 1
    lines = [
        json.dumps(({"prompt": name} if several else {}) | each.to_dict(), ensure_ascii=False) + "\n"
        for name, report in reports.items()
        for each in report.outcomes
    ]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), "".join(lines))


def _short(text: str) -> str:
    line = " ".join(text.split()) or "(nothing)"
    return line if len(line) <= _SAMPLE_WIDTH else line[: _SAMPLE_WIDTH - 3] + "..."


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def joined(reports: Mapping[str, Report]) -> Report:
    """Return the report of all records, which holds those of the tasks.

    Shares and means are over the records. What has no meaning across label sets (macro F1, predictions,
    perplexity) is in the tasks' own reports alone.
    """
    parts = list(reports.values())
    kinds = {part.task for part in parts}
    every = [replace(each, task=name) for name, part in reports.items() for each in part.outcomes]
    outcomes = tuple(sorted(every, key=lambda each: each.record))
    share = {"classification": "accuracy", "generation": "exact_match"}.get(parts[0].task, "")
    return Report(
        task=parts[0].task if len(kinds) == 1 else "mixed",
        rows=sum(part.rows for part in parts),
        without_prompt=parts[0].without_prompt,
        prompt_tokens=parts[0].prompt_tokens,
        input_tokens=_mean(parts, [part.input_tokens for part in parts]) or 0.0,
        accuracy=_mean(parts, [part.accuracy for part in parts]),
        exact_match=_mean(parts, [part.exact_match for part in parts]),
        rouge_l=_mean(parts, [part.rouge_l for part in parts]),
        intervals=mean_intervals(**{share: [each.right for each in outcomes]}) if len(kinds) == 1 else {},
        invalid=sum(part.invalid or 0 for part in parts),
        inputs_cut=sum(part.inputs_cut for part in parts),
        targets_cut=sum(part.targets_cut for part in parts),
        tasks=dict(reports),
        outcomes=outcomes,
        seconds=sum(part.seconds for part in parts),
    )


def _mean(parts: Sequence[Report], values: Sequence[float | None]) -> float | None:
    """Return the mean over the records; None where a task has no such value."""
    known = [value for value in values if value is not None]
    if len(known) < len(parts):
        return None
    rows = sum(part.rows for part in parts)
    return sum(value * part.rows for value, part in zip(known, parts, strict=True)) / rows
