"""What is trained to its end, on what, how it is validated, and how far it moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, final

import torch
from torch import Tensor
from torch.nn import Module

from softprompt.training.events import LOG_FILE

if TYPE_CHECKING:
    from softprompt.data import TokenRow
    from softprompt.prompts import Prompt, PromptModule
    from softprompt.training.objectives import Objective
    from softprompt.training.sampling import Sampling
    from softprompt.training.settings import TuneSettings

MAIN = "prompt"
"""Name of the stage that trains the prompt itself."""


class Measure(Protocol):
    """Says how good prompts are on rows that were not trained on."""

    def watch(self, found: dict[str, str], streaks: dict[str, int]) -> None:
        """Keep the signs of collapse, and the epochs in a row with each, in a run's state from now on."""

    def metrics(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Measure the prompts of all tasks, in the order of the tasks."""

    def quality(self, metrics: dict[str, float]) -> list[float]:
        """Return what decides which epoch is best, first things first; more is better."""


MOST_TOKENS = 128
"""Virtual tokens of which numbers are kept; of a longer prompt they are those of evenly spaced ones."""


@final
class Movement:
    """Remembers where a prompt started, which is where it is now.

    A run that is continued makes its first values again from its seed, so nothing of this is in its state.
    """

    def __init__(self, prompt: PromptModule) -> None:
        prompt.eval()  # one with dropout of its own would start elsewhere each time
        self._prompt, self._start = prompt, _values(prompt)

    def values(self) -> tuple[Tensor, Tensor]:
        """Return the values of each task's virtual tokens ``[K, P, X]``, and what training changed of them."""
        now = _values(self._prompt)
        return now, now - self._start

    def point(self) -> dict[str, Any]:
        """Return what goes into the history: root mean squares over the values of a virtual token.

        ``drift`` is that of what training changed, ``rms`` that of the values, both for every ``every``-th virtual
        token, from the first on, to four digits; with several tasks they are root mean squares over these too.
        """
        now, change = self.values()
        every = -(-now.shape[1] // MOST_TOKENS)
        found = {"drift": _rms(change, every), "rms": _rms(now, every)}
        return {"virtual_tokens": {"every": every, **found}}


@torch.no_grad()
def _values(prompt: PromptModule) -> Tensor:
    return torch.stack([prompt.prompt(task).by_token.detach().clone() for task in range(prompt.num_tasks)])


def _rms(values: Tensor, every: int) -> list[float]:
    found = values.double().square().mean((0, 2)).sqrt()  # [P]
    return [float(f"{value:.4g}") for value in found[::every].tolist()]


@dataclass(frozen=True, slots=True)
class Goal:
    """What is minimised, and how it is validated (None for not at all), where the method does not say."""

    objective: Objective
    measure: Measure | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """What is trained to its end, on what: fixed from its start, also across a resume.

    Attributes:
        prompt: The module whose parameters are trained.
        objective: What is minimised.
        rows: The tokenised training records.
        sampling: Which of them make which update, and the task of each.
        model: The frozen base.
        learning_rate: Peak learning rate of the prompt.
        rms: Root mean square of the base's own embeddings, or keys and values: the scale of the rate.
        usual_rate: The default learning rate on this base.
        validation: How the prompts are validated after each epoch; None for not at all.
        task_names: Names of the tasks; empty for a single data set.
        context_tokens: Tokens that the objective scores for each row besides its target.
        distils: Whether the objective has a part to report besides the likelihood.
        name: What its state and its results are kept under.
        log_file: Where its updates are logged in the output directory.
        is_needed: Whether a later stage needs what it trained.
        hidden: The virtual tokens of a prefix that a row does not see in training.
        movement: What notes after each epoch how far the prompt has moved; None for nothing.
    """

    prompt: PromptModule
    objective: Objective
    rows: Sequence[TokenRow]
    sampling: Sampling
    model: Module
    settings: TuneSettings
    learning_rate: float
    rms: float
    usual_rate: float
    validation: Measure | None = None
    task_names: tuple[str, ...] = ()
    context_tokens: int = 0
    distils: bool = False
    name: str = MAIN
    log_file: str = LOG_FILE
    is_needed: bool = False
    movement: Movement | None = None
    hidden: Mapping[TokenRow, frozenset[int]] = field(default_factory=dict)

    @property
    def of(self) -> str:
        """What a message adds to the number of an epoch."""
        return "" if self.name == MAIN else f" of the {self.name}"

    def total_updates(self) -> int:
        """Return the updates of the whole stage."""
        return self.settings.max_steps or self.settings.num_epochs * self.sampling.updates_per_epoch

    def epochs(self) -> int:
        """Return the epochs of the whole stage, of which ``max_steps`` may leave the last one unfinished."""
        return -(-self.total_updates() // self.sampling.updates_per_epoch)

    def name_of(self, index: int) -> str:
        """Return what a message calls a training row: its number, behind its task's name."""
        task = self.sampling.tasks[index]
        before = sum(other < task for other in self.sampling.tasks)
        number = str(index - before + 1)
        return f"{self.task_names[task]} {number}" if self.task_names else number
