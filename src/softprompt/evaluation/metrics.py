"""Metrics of predicted labels and of generated texts, as pure functions of strings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap
from sklearn.metrics import matthews_corrcoef, precision_recall_fscore_support

Interval = tuple[float, float]
"""Lower and upper end of a 95 % confidence interval."""

COLLAPSE_SHARE = 0.95
"""Share of the predictions on one label above which they count as collapsed."""

_RESAMPLES, _LEVEL, _BINS = 1000, 0.95, 15


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
    mcc: float
    intervals: Mapping[str, Interval]
    invalid: int
    per_label: tuple[LabelRow, ...]
    confusion: Mapping[str, Mapping[str, int]]
    predictions: Mapping[str, int]
    collapsed: bool


@dataclass(frozen=True, slots=True)
class TextMetrics:
    """How well texts were generated; what each number is, ``Report`` says.

    ``right`` and ``overlaps`` are of each answer: whether it is the target, and its ROUGE-L F-measure.
    """

    right: tuple[bool, ...]
    overlaps: tuple[float, ...]
    exact_match: float
    rouge_l: float
    bleu: float | None
    chrf: float | None
    intervals: Mapping[str, Interval]
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
        mcc=float(matthews_corrcoef(gold, predicted)) if len({*gold, *predicted}) > 1 else 0.0,
        intervals=_label_intervals(gold, predicted, names),
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
    equal, overlap = list(map(str.__eq__, stripped, wanted)), rouge_l(wanted, stripped)
    bleu, chrf = _translation_scores(wanted, stripped)
    return TextMetrics(
        right=tuple(equal),
        overlaps=tuple(overlap),
        exact_match=sum(equal) / len(wanted),
        rouge_l=sum(overlap) / len(wanted),
        bleu=bleu,
        chrf=chrf,
        intervals=mean_intervals(exact_match=equal, rouge_l=overlap),
        invalid=None if names is None else sum(answer not in names for answer in stripped),
    )


def rouge_l(targets: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return the ROUGE-L F-measure (Lin 2004) of each answer, without stemming.

    Words are runs of letters and digits in lower case. For ASCII text these are the words of
    the ``rouge_score`` package; its own tokenizer would drop every other letter (phonemes,
    accents, Cyrillic), which would leave nothing to compare.
    """
    from rouge_score.rouge_scorer import RougeScorer  # half a second or more of nltk, for this metric alone

    scorer = RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_Words())
    return [
        float(scorer.score(target, answer)["rougeL"].fmeasure)
        for target, answer in zip(targets, answers, strict=True)
    ]


def calibration_error(confidence: Sequence[float], right: Sequence[bool]) -> float:
    """Return the expected calibration error of at least one prediction (Guo et al. 2017), 15 bins of one width.

    It is the mean distance, weighted by the predictions in each bin of confidence, between the bin's mean
    confidence and the share of its predictions that is right.
    """
    sure, hits = np.asarray(confidence), np.asarray(right, dtype=float)
    bins = np.clip(np.ceil(sure * _BINS).astype(int) - 1, 0, _BINS - 1)
    gaps = np.bincount(bins, weights=hits - sure, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(sure))


def intervals(samples: Sequence[np.ndarray], statistic: Callable[..., Any], **how: Any) -> list[Interval]:
    """Return the 95 % interval of each value of a statistic of records, ``[N]`` for each of its arguments.

    The percentile bootstrap (Efron 1979) of 1,000 resamples of the records, always the same ones; none for
    a single record.
    """
    if len(samples[0]) < 2:
        return []
    found = bootstrap(
        samples,
        statistic,
        paired=True,
        n_resamples=_RESAMPLES,
        batch=100,
        confidence_level=_LEVEL,
        method="percentile",
        rng=0,
        **how,
    ).confidence_interval
    return [(float(low), float(high)) for low, high in zip(*map(np.atleast_1d, found), strict=True)]


def mean_intervals(**values: Sequence[float]) -> dict[str, Interval]:
    """Return the interval of the mean of each list of values, by its name."""
    found = {name: intervals([np.asarray(each, dtype=float)], np.mean) for name, each in values.items()}
    return {name: ends[0] for name, ends in found.items() if ends}


class _Words:
    """The tokenizer interface of ``rouge_score``, for text in any script."""

    _run = re.compile(r"[^\W_]+")

    def tokenize(self, text: str) -> list[str]:
        return self._run.findall(text.lower())


def _label_intervals(gold: Sequence[str], predicted: Sequence[str], names: Sequence[str]) -> dict[str, Interval]:
    """Return the intervals of accuracy, macro F1 and MCC, each computed from the counts of a resample."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    wanted, got = (np.array([numbers[label] for label in side]) for side in (gold, predicted))
    size, total = len(numbers), len(gold)

    def scores(wanted: np.ndarray, got: np.ndarray) -> np.ndarray:
        table = np.bincount(wanted * size + got, minlength=size * size).reshape(size, size).astype(float)
        hits, support, guessed = table.diagonal(), table.sum(1), table.sum(0)
        both = support + guessed
        spread = (total**2 - guessed @ guessed) * (total**2 - support @ support)
        mcc = (hits.sum() * total - support @ guessed) / spread**0.5 if spread else 0.0
        return np.array([hits.sum() / total, (2 * hits[both > 0] / both[both > 0]).mean(), mcc])

    found = intervals((wanted, got), scores, vectorized=False)
    return dict(zip(("accuracy", "macro_f1", "mcc"), found, strict=False))


def _translation_scores(targets: Sequence[str], answers: Sequence[str]) -> tuple[float | None, float | None]:
    """Return BLEU and chrF of the corpus (sacrebleu's defaults, 0 to 100), None where it is not installed."""
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        return None, None

    # Without force it warns of texts that end with a separate full stop, which answers may well do.
    bleu, chrf = (float(each.corpus_score(answers, [targets]).score) for each in (BLEU(force=True), CHRF()))
    return bleu, chrf


def _confusion(gold: Sequence[str], predicted: Sequence[str]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for (wanted, got), count in sorted(Counter(zip(gold, predicted, strict=True)).items()):
        table.setdefault(wanted, {})[got] = count
    return table


def _top_share(labels: Sequence[str]) -> float:
    return max(Counter(labels).values()) / len(labels)
