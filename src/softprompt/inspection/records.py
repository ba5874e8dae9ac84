"""Which records a prompt wins and loses: against its base without it, its own nearest words, and other prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from softprompt.evaluation import Baseline, Outcome, Paired, compare

if TYPE_CHECKING:
    from softprompt.inference import TunedPrompt

ZERO_SHOT, WORDS = "zero-shot", "nearest words"
EXAMPLES = 3
_METRICS = ("accuracy", "macro_f1", "exact_match", "rouge_l", "perplexity")


@dataclass(frozen=True, slots=True)
class Example:
    """One record that a prompt won or lost, its number in the data from 1, and both answers."""

    record: int
    won: bool
    fields: Mapping[str, str]
    target: str
    prompt: str
    other: str


@dataclass(frozen=True, slots=True)
class Contest:
    """How a prompt does on some records, and others on the same ones.

    Attributes:
        task: Whether labels are scored (classification) or texts generated (generation).
        rows: Number of records.
        scores: Metrics of each answerer by its name; the prompt's is ``prompt``.
        against: The prompt against each of the others: ``won`` and ``difference`` are the prompt's.
        examples: The first records won and lost against each of them.
    """

    task: str
    rows: int
    scores: Mapping[str, Mapping[str, float]]
    against: Mapping[str, Paired]
    examples: Mapping[str, Sequence[Example]]


def contest(
    tuned: TunedPrompt,
    others: Mapping[str, TunedPrompt],
    records: Sequence[Any],
    numbers: Sequence[int],
    **options: Any,
) -> Contest:
    """Let a prompt, its base zero-shot and others answer the same records.

    Args:
        tuned: The prompt.
        others: What answers besides, by name.
        records: What ``compare`` takes as its data.
        numbers: Number of each record in the data that they are from.
        **options: Further arguments of ``compare``.

    Raises:
        SoftPromptError: As ``compare``.
    """
    found = compare({"prompt": tuned, ZERO_SHOT: Baseline(), **others}, records, **options)
    own, reports = found.reports["prompt"], found.reports
    scores = {
        name: {metric: value for metric in _METRICS if (value := getattr(report, metric)) is not None}
        for name, report in reports.items()
    }
    examples = {name: _examples(own.outcomes, reports[name].outcomes, numbers) for name in found.against}
    against = {name: _turned(each) for name, each in found.against.items()}
    return Contest(own.task, own.rows, scores, against, examples)


def _turned(paired: Paired) -> Paired:
    """Return a result as the other side sees it."""
    ends = paired.interval and (-paired.interval[1], -paired.interval[0])
    return replace(paired, won=paired.lost, lost=paired.won, difference=-paired.difference, interval=ends)


def _examples(ours: Sequence[Outcome], theirs: Sequence[Outcome], numbers: Sequence[int]) -> list[Example]:
    pairs = list(zip(ours, theirs, numbers, strict=True))
    return [
        Example(number, won, dict(one.fields), one.target, one.answer, other.answer)
        for won in (True, False)
        for one, other, number in islice(
            (each for each in pairs if (_worth(each[0]) - _worth(each[1])) * (1 if won else -1) > 0), EXAMPLES
        )
    ]


def _worth(outcome: Outcome) -> float:
    return float(outcome.right) if outcome.probabilities is not None else outcome.score
