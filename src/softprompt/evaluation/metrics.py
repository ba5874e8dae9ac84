"""Metrics of predicted labels and of generated texts, as pure functions of strings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import precision_recall_fscore_support

COLLAPSE_SHARE = 0.95
"""Share of the predictions on one label above which they count as collapsed."""


@dataclass(frozen=True, slots=True)
class LabelRow:
    """Counts and rates of one label.

    Attributes:
        label: The label.
        support: Rows whose gold label it is.
        predicted: Rows for which it was predicted.
        precision: Share of ``predicted`` that is right; 0 when nothing was predicted.
        recall: Share of ``support`` that was found; 0 without support.
        f1: Harmonic mean of the two.
    """

    label: str
    support: int
    predicted: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, slots=True)
class LabelMetrics:
    """How well labels were predicted; what each number is, ``Report`` says."""

    accuracy: float
    macro_f1: float
    invalid: int
    per_label: tuple[LabelRow, ...]
    confusion: Mapping[str, Mapping[str, int]]
    predictions: Mapping[str, int]
    collapsed: bool


@dataclass(frozen=True, slots=True)
class TextMetrics:
    """How well texts were generated; what each number is, ``Report`` says."""

    exact_match: float
    rouge_l: float
    invalid: int | None


def label_metrics(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> LabelMetrics:
    """Compare predicted labels with gold ones, at least one row."""
    known = set(labels)
    strangers = sorted(set(gold) - known)
    names = [*labels, *strangers]
    precision, recall, f1, support = precision_recall_fscore_support(
        gold, predicted, labels=names, average=None, zero_division=0
    )
    counts = Counter(predicted)
    rows = tuple(
        LabelRow(name, int(support[i]), counts[name], *map(float, (precision[i], recall[i], f1[i])))
        for i, name in enumerate(names)
    )
    occurring = [row.f1 for row in rows if row.support or row.predicted]
    return LabelMetrics(
        accuracy=sum(map(str.__eq__, gold, predicted)) / len(gold),
        macro_f1=sum(occurring) / len(occurring),
        invalid=sum(label not in known for label in gold),
        per_label=rows,
        confusion=_confusion(gold, predicted),
        predictions={name: counts[name] for name in labels},
        collapsed=_top_share(predicted) > COLLAPSE_SHARE >= _top_share(gold),
    )


def text_metrics(
    targets: Sequence[str], answers: Sequence[str], labels: Sequence[str] | None = None
) -> TextMetrics:
    """Compare generated answers with targets, at least one row."""
    stripped = [answer.strip() for answer in answers]
    wanted = [target.strip() for target in targets]
    names = None if labels is None else {label.strip() for label in labels}
    return TextMetrics(
        exact_match=sum(map(str.__eq__, stripped, wanted)) / len(wanted),
        rouge_l=rouge_l(wanted, stripped),
        invalid=None if names is None else sum(answer not in names for answer in stripped),
    )


def rouge_l(targets: Sequence[str], answers: Sequence[str]) -> float:
    """Return the mean ROUGE-L F-measure (Lin 2004), without stemming.

    Words are runs of letters and digits in lower case. For ASCII text these are the words of
    the ``rouge_score`` package; its own tokenizer would drop every other letter (phonemes,
    accents, Cyrillic), which would leave nothing to compare.
    """
    scorer = RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_Words())
    scores = [
        scorer.score(target, answer)["rougeL"].fmeasure for target, answer in zip(targets, answers, strict=True)
    ]
    return float(sum(scores) / len(scores))


class _Words:
    """The tokenizer interface of ``rouge_score``, for text in any script."""

    _run = re.compile(r"[^\W_]+")

    def tokenize(self, text: str) -> list[str]:
        return self._run.findall(text.lower())


def _confusion(gold: Sequence[str], predicted: Sequence[str]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for (wanted, got), count in sorted(Counter(zip(gold, predicted, strict=True)).items()):
        table.setdefault(wanted, {})[got] = count
    return table


def _top_share(labels: Sequence[str]) -> float:
    return max(Counter(labels).values()) / len(labels)
