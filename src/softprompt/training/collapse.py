"""Early signs of a run that goes nowhere, each said once, with what to change.

Looked for after each quarter of the updates: a prompt that has hardly left its start, one that has grown out of the
base's scale, a loss where it began. And in the validation of labels: one answer for all, accuracy at chance.
What was found is among the metrics, as ``collapse``.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, final

from softprompt.prompts import CPTEmbedding
from softprompt.training.stage import Movement

if TYPE_CHECKING:
    from torch import Tensor

    from softprompt.prompts import PromptModule
    from softprompt.training.state import RunState

logger = logging.getLogger(__name__)

LOOKS = 4
"""How often a run is looked at; the first quarter may be warm-up, so the signs below count from the half on."""
LEAST_DRIFT, MIN_UPDATES = 0.2, 8
"""Share of the base's rms that a prompt has to be from its start after half of the updates, and that many of them;
or what one update moves it at the default rate, where that is less (keys and values of many layers).

Healthy runs measured 0.9 (keys and values) to 3.7 (virtual tokens) there; PEFT's rate of 1e-3 on a base of rms 0.14
was at 0.13 after 30 updates and had not begun to learn."""
MOST_NORM = 30.0
"""Times the base's rms, or its own at the start, that a prompt's rms may be: healthy runs grow to 2 to 5."""
LEAST_FALL = 0.99
"""Share of its start that the loss has to fall below."""
WINDOW = 50
"""Updates at most whose mean loss is the start, or the present."""
ONE_LABEL_SHARE = 0.95
"""Share of the answers on one label above which they count as one for all, as in an evaluation's ``collapsed``."""
ONE_LABEL_EPOCHS, PLATEAU_EPOCHS = 2, 3
"""Epochs in a row from which on one answer for all, or accuracy at chance, is worth a warning."""


@final
class CollapseWatch:
    """Looks at a prompt as it is trained.

    Args:
        prompt: The module, as it was before the first update.
        rms: Root mean square of what it is a prompt among: the base's embeddings, or its keys and values.
        rate: Its peak learning rate.
        move: What it moves at least where it learns: of keys and values an update at their default rate.
        total: Updates of the run.
        of: What a message adds to the word prompt, such as which seed's it is.
    """

    def __init__(
        self, prompt: PromptModule, rms: float, rate: float, move: float, total: int, of: str = ""
    ) -> None:
        self._prompt, self._rms, self._rate, self._total, self._of = prompt, rms, rate, total, of
        self._least = min(LEAST_DRIFT, move / rms)
        self._movement = Movement(prompt)
        self._limit = MOST_NORM * max(1.0, _rms(self._movement.values()[0]) / rms)
        self._window = min(WINDOW, max(4, total // 8))

    def update(self, state: RunState, loss: float) -> None:
        """Note the loss of the update that was just done, and look where a quarter of the run is over."""
        if len(state.first_losses) < self._window:
            state.first_losses.append(loss)
        state.last_losses = [*state.last_losses, loss][-self._window :]
        if state.update * LOOKS // self._total > (state.update - 1) * LOOKS // self._total:
            self._look(state)

    def _look(self, state: RunState) -> None:
        at = f"after {state.update} of {self._total} updates"
        norm, drift = (_rms(each) / self._rms for each in self._movement.values())
        if norm > self._limit:
            say(
                state.collapse,
                "norm",
                f"{at} the rms of the prompt{self._of} is {norm:.3g} x the base's own, outside anything it was "
                f"trained on: lower learning_rate {self._rate:.3g}, or set max_grad_norm or weight_decay",
            )
        if 2 * state.update < self._total:
            return
        if (
            drift < self._least and state.update >= MIN_UPDATES and not isinstance(self._prompt, CPTEmbedding)
        ):  # which moves little by design
            say(
                state.collapse,
                "drift",
                f"{at} the prompt{self._of} has barely moved, {drift:.2g} x the base's rms: raise learning_rate "
                f"{self._rate:.3g}, train for more updates, or leave it out for the default",
            )
        first, last = fmean(state.first_losses), fmean(state.last_losses)
        if last > LEAST_FALL * first and state.update >= 2 * self._window:
            say(
                state.collapse,
                "loss",
                f"{at} the loss{self._of} is where it began, {first:.4f} then and {last:.4f} now: change the "
                "learning rate or the initial prompt, or see whether the base model can do the task at all",
            )


@final
@dataclass
class LabelWatch:
    """Looks at the answers of each validation of a task with labels.

    Attributes:
        of: Names the task in messages.
        found: What was said, by the sign; the run's state holds it.
        streaks: Validations in a row with each sign; likewise.
    """

    of: str = ""
    found: dict[str, str] = field(default_factory=dict)
    streaks: dict[str, int] = field(default_factory=dict)

    def look(self, predicted: list[int], gold: list[int], names: list[str], accuracy: float) -> None:
        """Say so when nearly all records get one label, or accuracy stays at the commonest label's share."""
        answers, chance = Counter(predicted), max(Counter(gold).values()) / len(gold)
        labels, at_chance = f"labels{self.of}", f"chance{self.of}"
        ((top, count),) = answers.most_common(1)
        shown = {labels: count / len(gold) > ONE_LABEL_SHARE >= chance, at_chance: accuracy <= chance}
        self.streaks |= {sign: self.streaks.get(sign, 0) + 1 if seen else 0 for sign, seen in shown.items()}
        if self.streaks[labels] == ONE_LABEL_EPOCHS:
            say(
                self.found,
                labels,
                f"{count} of {len(gold)} validation records{self.of} are answered {names[top]!r}, "
                f"{ONE_LABEL_EPOCHS} epochs in a row; change the learning rate, the initial prompt or the seed",
            )
        if self.streaks[at_chance] == PLATEAU_EPOCHS:
            say(
                self.found,
                at_chance,
                f"validation accuracy {accuracy:.3f}{self.of} is not above the commonest label's share "
                f"{chance:.3f} for {PLATEAU_EPOCHS} epochs; change the learning rate, the initial prompt or the "
                "base model",
            )


def say(found: dict[str, str], sign: str, problem: str) -> None:
    """Log a sign of collapse and keep it, unless it was found before."""
    if sign not in found:
        found[sign] = problem
        logger.warning("%s", problem)


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
