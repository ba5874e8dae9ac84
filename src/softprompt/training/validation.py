"""How good prompts are on records that were not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, final

import torch

from softprompt.generation import TargetLikelihood, classify_rows, target_likelihood
from softprompt.training.collapse import LabelWatch

if TYPE_CHECKING:
    from softprompt.data import TokenRow
    from softprompt.engine import Engine
    from softprompt.prompts import Prompt

ROWS_BETWEEN_STOPS = 256


def quality_of(metrics: Mapping[str, float]) -> list[float]:
    """Return what decides which prompt is best, first things first; more is better.

    The loss decides between equal accuracies, of which a small data set has many.
    """
    accuracy = [metrics["accuracy"]] if "accuracy" in metrics else []
    return [*accuracy, -metrics["loss"]]


@dataclass
class Validation:
    """The validation records of one task and how they are scored; with ``labels`` as a classification.

    ``labels`` maps each label to its target ids. ``check_stop`` is called every 256 rows. ``task``
    is the number of the task, ``name`` what it is called among several.
    """

    engine: Engine
    rows: Sequence[TokenRow]
    labels: dict[str, tuple[int, ...]] | None
    batch_size: int
    check_stop: Callable[[], None] = lambda: None
    task: int = 0
    name: str = ""
    _watch: LabelWatch = field(default_factory=LabelWatch, init=False)
    quality = staticmethod(quality_of)

    def __post_init__(self) -> None:
        self._watch.of = f" of task {self.name}" if self.name else ""

    def watch(self, found: dict[str, str], streaks: dict[str, int]) -> None:
        """Keep in a run's state what the answers show; see ``LabelWatch``."""
        self._watch.found, self._watch.streaks = found, streaks

    def metrics(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Measure the task's own of the prompts of all tasks.

        Returns:
            ``accuracy`` (labels) or ``perplexity`` (free text), and ``loss`` (nats per token).
        """
        prompt = prompts[self.task]
        return self._likelihood(prompt) if self.labels is None else self._accuracy(prompt)

    def _parts(self) -> Iterator[Sequence[TokenRow]]:
        for start in range(0, len(self.rows), ROWS_BETWEEN_STOPS):
            self.check_stop()
            yield self.rows[start : start + ROWS_BETWEEN_STOPS]

    def _likelihood(self, prompt: Prompt) -> dict[str, float]:
        parts = [target_likelihood(self.engine, rows, prompt, batch_size=self.batch_size) for rows in self._parts()]
        whole = TargetLikelihood(sum(p.log_prob for p in parts), sum(p.tokens for p in parts))
        return {"perplexity": whole.perplexity, "loss": whole.loss}

    def _accuracy(self, prompt: Prompt) -> dict[str, float]:
        assert self.labels is not None
        names, ids = list(self.labels), list(self.labels.values())
        parts = [
            classify_rows(self.engine, rows, ids, prompt, batch_size=self.batch_size).scores
            for rows in self._parts()
        ]
        scores = torch.cat(parts).double()  # [N, K]
        gold = torch.tensor([ids.index(row.target) for row in self.rows])
        predicted = scores.argmax(dim=1)
        accuracy = (predicted == gold).double().mean().item()
        log_prob = scores[torch.arange(len(gold)), gold].sum().item()
        self._watch.look(predicted.tolist(), gold.tolist(), names, accuracy)
        whole = TargetLikelihood(log_prob, sum(len(row.target) for row in self.rows))
        return {"accuracy": accuracy, "loss": whole.loss}


@final
@dataclass
class TaskValidations:
    """Validation of several tasks: each by itself, and the means by which epochs are compared."""

    parts: Sequence[Validation]
    quality = staticmethod(quality_of)

    def watch(self, found: dict[str, str], streaks: dict[str, int]) -> None:
        """Keep in a run's state what the answers of all tasks show; see ``LabelWatch``."""
        for part in self.parts:
            part.watch(found, streaks)

    def metrics(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Measure the prompts of all tasks, in the order of the tasks.

        Returns:
            ``accuracy`` (mean over the tasks with labels, if any) and ``loss`` (mean over all
            tasks), then each task's own metrics as ``<task> accuracy`` and so on.
        """
        found = {part.name: part.metrics(prompts) for part in self.parts}
        accuracies = [each["accuracy"] for each in found.values() if "accuracy" in each]
        means = {"accuracy": fmean(accuracies)} if accuracies else {}
        means["loss"] = fmean(each["loss"] for each in found.values())
        own = {f"{task} {name}": v for task, each in found.items() for name, v in each.items()}
        return means | own
