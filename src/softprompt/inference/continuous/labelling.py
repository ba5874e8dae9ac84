"""Inputs of one prompt whose labels are to be scored: batch rows for a scorer, and label scores from its sums."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from softprompt.engine import EngineRow
from softprompt.inference.requests import Input
from softprompt.inference.scoring import LabelScores, label_rows, label_scores, per_token
from softprompt.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Labelling:
    """Inputs and the labels they may have.

    Attributes:
        labels: The K labels.
        label_ids: Their tokens.
        inputs: The N inputs.
    """

    labels: Sequence[str]
    label_ids: Sequence[tuple[int, ...]]
    inputs: Sequence[Input]

    def rows(self, prompt: Prompt | None) -> list[EngineRow]:
        """Return a batch row for each label of each input behind a prompt, input by input."""
        return [
            row
            for each in self.inputs
            for row in label_rows(each.ids, self.label_ids, prompt, each.at)
        ]

    def answers(self, sums: Tensor, *, normalize: bool) -> list[LabelScores]:
        """Return what the rows' log-probabilities ``[N·K]`` say; normalised they are per token."""
        scores = sums.view(len(self.inputs), len(self.labels))
        if normalize:
            scores = per_token(scores, [len(ids) for ids in self.label_ids])
        return label_scores(self.labels, scores, [each.cut for each in self.inputs])


@dataclass(frozen=True, slots=True)
class Scored:
    """Inputs of one prompt that a scorer has.

    Attributes:
        numbers: Which of a call's inputs they are.
        labelling: The inputs with their labels.
        sums: Gets the rows' log-probabilities.
    """

    numbers: Sequence[int]
    labelling: Labelling
    sums: Future[Tensor]


def in_order(
    scored: Sequence[Scored], sums: Sequence[Tensor], *, normalize: bool
) -> list[LabelScores]:
    """Return the answers of several prompts in the order of a call's inputs."""
    found: dict[int, LabelScores] = {}
    for each, own in zip(scored, sums, strict=True):
        found |= zip(each.numbers, each.labelling.answers(own, normalize=normalize), strict=True)
    return [found[number] for number in range(len(found))]
