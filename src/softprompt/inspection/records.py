"""Which records a prompt wins and loses: against its base without it, its own nearest words, and other prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softprompt.evaluation import Baseline, Outcome, compare
from softprompt.inference import TunedPrompt

ZERO_SHOT, WORDS = "zero-shot", "nearest words"
EXAMPLES = 3
_METRICS = ("accuracy", "macro_f1", "exact_match", "rouge_l", "perplexity")


@dataclass(frozen=True, slots=True)
class Example:
    """One record, with the answers of the prompt and of what it is compared with."""

    record: int
    fields: Mapping[str, str]
    target: str
    prompt: str
    other: str


@dataclass(frozen=True, slots=True)
class Versus:
    """A prompt against another answerer on the same records, seen from the prompt.

    Attributes:
        won: Records that the prompt has right and the other has not; for texts, those with a higher ROUGE-L.
        lost: Records the other way round.
        difference: The prompt's accuracy, or mean ROUGE-L, less the other's.
        interval: 95 % interval of the difference, from a paired bootstrap; None for one record.
        p_value: Of an exact binomial test of won against lost.
        examples_won: The first of the records won.
        examples_lost: The first of those lost.
    """

    won: int
    lost: int
    difference: float
    interval: tuple[float, float] | None
    p_value: float
    examples_won: tuple[Example, ...]
    examples_lost: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Contest:
    """How a prompt does on some records, and others on the same ones.

    Attributes:
        task: Whether labels are scored (classification) or texts generated (generation).
        rows: Number of records.
        scores: Metrics of each answerer by its name; the prompt's is ``prompt``.
        against: The prompt against each of the others.
    """

    task: str
    rows: int
    scores: Mapping[str, Mapping[str, float]]
    against: Mapping[str, Versus]


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
    own = found.reports["prompt"]
    scores = {
        name: {metric: value for metric in _METRICS if (value := getattr(report, metric)) is not None}
        for name, report in found.reports.items()
    }
    versus = {}
    for name, paired in found.against.items():
        pairs = list(zip(own.outcomes, found.reports[name].outcomes, numbers, strict=True))
        ends = paired.interval
        versus[name] = Versus(
            won=paired.lost,
            lost=paired.won,
            difference=-paired.difference,
            interval=None if ends is None else (-ends[1], -ends[0]),
            p_value=paired.p_value,
            examples_won=_examples(pairs, 1),
            examples_lost=_examples(pairs, -1),
        )
    return Contest(own.task, own.rows, scores, versus)


def _examples(pairs: Sequence[tuple[Outcome, Outcome, int]], sign: int) -> tuple[Example, ...]:
    """Return the first records that the first of two won (1), or lost (-1)."""
    chosen = [pair for pair in pairs if sign * (_worth(pair[0]) - _worth(pair[1])) > 0]
    return tuple(
        Example(number, dict(ours.fields), ours.target, ours.answer, theirs.answer)
        for ours, theirs, number in chosen[:EXAMPLES]
    )


def _worth(outcome: Outcome) -> float:
    return float(outcome.right) if outcome.probabilities is not None else outcome.score
