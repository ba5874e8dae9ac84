"""One training stage: a prompt, its objective, its data and its hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch.nn import Module

from softprompt.data import TokenRow
from softprompt.prompts import Prompt, PromptModule
from softprompt.training.objective import Objective
from softprompt.training.sampling import Sampling
from softprompt.training.settings import TuneSettings


class Measure(Protocol):
    """Says how good prompts are on rows that were not trained on."""

    def metrics(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Measure the prompts of all tasks, in the order of the tasks."""
        ...

    def quality(self, metrics: dict[str, float]) -> list[float]:
        """Return what decides which epoch is best, first things first; more is better."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """One stage of a run: fixed from its start to its end, also across a resume.

    Attributes:
        prompt: The module whose parameters are trained.
        objective: What is lowered.
        rows: The tokenised training records.
        sampling: Which of them make which update, and the task of each.
        model: The frozen base.
        learning_rate: Peak rate of the prompt, for what is said of it.
        task_names: Names of the tasks; empty for a single data set.
        distils: Whether the objective has a part to report besides the likelihood.
    """

    prompt: PromptModule
    objective: Objective
    rows: Sequence[TokenRow]
    sampling: Sampling
    model: Module
    settings: TuneSettings
    learning_rate: float
    embedding_rms: float
    validation: Measure | None = None
    task_names: tuple[str, ...] = ()
    distils: bool = False

    def total_updates(self) -> int:
        """Return the updates of the whole stage."""
        return self.settings.num_epochs * len(self.sampling.updates(0))

    def name_of(self, index: int) -> str:
        """Return what a message calls a training row: its number, behind its task's name."""
        task = self.sampling.tasks[index]
        before = sum(other < task for other in self.sampling.tasks)
        number = str(index - before + 1)
        return f"{self.task_names[task]} {number}" if self.task_names else number
