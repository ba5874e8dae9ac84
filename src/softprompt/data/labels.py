"""Whether targets are labels to choose from, or free text to generate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from softprompt.errors import ConfigError, DataError, nearest

Task: TypeAlias = Literal["classification", "generation"]

MOST_LABELS = 100
LONGEST_LABEL = 64  # characters
FEWEST_RECORDS_PER_LABEL = 2.0


def label_set(targets: Sequence[str], *, task: Task | None = None) -> tuple[str, ...] | None:
    """Return the sorted labels of a classification task, or None for free text.

    ``task`` decides when it is given. Otherwise the targets are labels when all of this holds:

    - there are at least 2 and at most 100 distinct ones,
    - each occurs at least twice on average,
    - each is one line of at most 64 characters.

    Raises:
        ConfigError: ``task`` is not a task.
        DataError: ``task`` is classification, and there is only one label.
    """
    if task not in (None, "classification", "generation"):
        raise ConfigError(
            f"expected task 'classification' or 'generation', got {task!r}"
            f"{nearest(str(task), ('classification', 'generation'))}"
        )
    if task == "generation":
        return None
    labels = tuple(sorted(set(targets)))
    if task == "classification":
        if len(labels) < 2:
            raise DataError(
                f"classification needs at least 2 distinct targets, got {len(labels)}: "
                f"{', '.join(map(repr, labels)) or 'none'}; add records or set task to 'generation'"
            )
        return labels
    few = 2 <= len(labels) <= MOST_LABELS
    often = len(targets) >= FEWEST_RECORDS_PER_LABEL * len(labels)
    short = all(len(label) <= LONGEST_LABEL and "\n" not in label for label in labels)
    return labels if few and often and short else None
