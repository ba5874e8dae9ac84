"""What a task came to, and its row of the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from real_data import Split


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        name, base_model, metric: What was measured, on which frozen model.
        rows: Training, validation and test rows; with folds, of all folds together for the test.
        commonest: Share of the commonest label in the test rows; None for free text.
        settings: Virtual tokens, epochs, learning rate / embedding rms, and how it started.
        base: The metric without a prompt, one number for each seed where a head is trained.
        tuned: The metric with the prompt, one number for each seed.
        base_perplexity, tuned_perplexity: Of the target tokens of the test rows; None for heads.
        seconds: Mean duration of one seed, training and evaluation.
    """

    name: str
    base_model: str
    metric: str
    rows: tuple[int, int, int]
    commonest: float | None
    settings: Mapping[str, Any]
    base: Sequence[float]
    tuned: Sequence[float]
    base_perplexity: float | None
    tuned_perplexity: Sequence[float] | None
    seconds: float


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)


def sizes(splits: Sequence[Split]) -> tuple[int, int, int]:
    """Return the rows of each part: the test rows of all folds, the rest of the first."""
    first = splits[0]
    return len(first.train), len(first.validation), sum(len(split.test) for split in splits)


def commonest_share(splits: Sequence[Split]) -> float:
    """Return the accuracy of always giving the commonest label of the test rows."""
    counts = Counter(row["output"] for split in splits for row in split.test)
    return max(counts.values()) / counts.total()


def spread(values: Sequence[float]) -> str:
    """Return the mean, and the lowest and highest where there are several."""
    middle = f"{mean(values):.3f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3f}-{max(values):.3f})"


def line(result: Result) -> str:
    """Return a row of the table."""
    settings = result.settings
    perplexity = "-"
    if result.commonest is None and result.base_perplexity and result.tuned_perplexity:
        perplexity = f"{result.base_perplexity:.2f} → {mean(result.tuned_perplexity):.2f}"
    cells = [
        result.name,
        result.base_model,
        " / ".join(str(count) for count in result.rows),
        f"{settings['tokens']} {settings['init']}, {settings['epochs']}, {settings['rate']:g}",
        "-" if result.commonest is None else f"{result.commonest:.3f}",
        spread(result.base),
        spread(result.tuned),
        perplexity,
        f"{result.seconds:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = """\
| task | frozen model | train / validation / test | tokens and init, epochs, rate / rms | commonest label \
| base | tuned | perplexity | s / seed |
|---|---|---|---|---|---|---|---|---|"""
