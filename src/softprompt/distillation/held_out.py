"""Questions that were kept apart, with what the teacher predicts for their answers: what a report measures on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from softprompt.engine import Engine, EngineRow
from softprompt.training import TopTargets

if TYPE_CHECKING:
    from softprompt.data import TokenRow
    from softprompt.distillation import Question, Teacher
    from softprompt.inference import TunedPrompt
    from softprompt.prompts import Prompt


@final
@dataclass(frozen=True, slots=True)
class HeldOut:
    """Questions that nothing was trained on, one row each, all lists in the same order.

    Attributes:
        questions: The questions, with their answers and the numbers of their passages.
        asked: Their rows as the teacher reads them, behind its passage; ``at`` is where that stands.
        rows: Their rows as the student reads them; the targets are the same tokens.
        targets: What the teacher predicts for the target tokens of each row.
    """

    questions: Sequence[Question]
    asked: Sequence[TokenRow]
    rows: Sequence[TokenRow]
    targets: Sequence[TopTargets]

    def with_text(self, prompts: Sequence[Prompt]) -> list[EngineRow]:
        """Return the teacher's rows with other prompts in the place of its passages, one for each passage."""
        pairs = zip(self.questions, self.asked, strict=True)
        return [EngineRow(row.source, row.target, prompts[each.passage], row.at) for each, row in pairs]

    def with_prompt(self, prompt: Prompt | None) -> list[EngineRow]:
        """Return the student's rows with one prompt, or without any."""
        return [EngineRow(row.source, row.target, prompt, row.at) for row in self.rows]


@final
@dataclass(frozen=True, slots=True)
class Distilled:
    """A finished distillation, all that a report of it needs.

    Attributes:
        tuned: The base with the prompt that was trained, its template, chat or not, and its limits.
        teacher: The base with the text: ``passages``, ``prompts``, and ``tuned`` for answers of one of them.
        held_out: What was kept apart; without questions where nothing was.
    """

    tuned: TunedPrompt
    teacher: Teacher
    held_out: HeldOut


@final
@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a student is from its teacher on target tokens.

    Attributes:
        nats: Mean KL(teacher || student) of a token, in nats.
        agreement: Share of the tokens whose most likely one is the teacher's.
        tokens: Target tokens.
    """

    nats: float
    agreement: float
    tokens: int


def divergence_of(
    engine: Engine,
    rows: Sequence[EngineRow],
    targets: Sequence[TopTargets],
    *,
    batch_size: int,
    check_stop: Callable[[], None] = lambda: None,
) -> Divergence:
    """Return how far the predictions for rows are from a teacher's.

    Args:
        engine: Runs the rows.
        rows: At least one, each with its prompt or without one.
        targets: What the teacher predicts for the target tokens of each.
        batch_size: Rows in a pass, at most.
        check_stop: Called between passes.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].source) + len(rows[i].target))

    def measured(own: Sequence[int]) -> list[tuple[float, int]]:
        each = [(0.0, 0)] * len(own)
        for start in range(0, len(own), batch_size):
            check_stop()
            part = own[start : start + batch_size]
            wanted = TopTargets.joined([targets[i] for i in part])
            with torch.no_grad():
                found = engine.predict([rows[i] for i in part])
                logits = found.logits[found.predictor]
                nats = float(wanted.divergence(logits).double().sum())
                each[start] = nats, int(wanted.agreement(logits).sum())  # of the whole batch
        return each

    sums = engine.processes.split(order, measured)
    tokens = sum(len(each) for each in targets)
    return Divergence(sum(nats for nats, _ in sums) / tokens, sum(count for _, count in sums) / tokens, tokens)


@final
@dataclass(frozen=True, slots=True)
class HeldOutMeasure:
    """Validates a student on what was kept apart: its divergence from the teacher decides which epoch is best."""

    engine: Engine
    held_out: HeldOut
    batch_size: int
    check_stop: Callable[[], None]

    def watch(self, found: dict[str, str], streaks: dict[str, int]) -> None:
        """Look for no signs of collapse: a divergence shows none."""

    def metrics(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Measure the prompt; see ``Measure``.

        Returns:
            ``divergence`` (nats per token) and ``agreement`` (share of the tokens).
        """
        found = divergence_of(
            self.engine,
            self.held_out.with_prompt(prompts[0]),
            self.held_out.targets,
            batch_size=self.batch_size,
            check_stop=self.check_stop,
        )
        return {"divergence": found.nats, "agreement": found.agreement}

    def quality(self, metrics: dict[str, float]) -> list[float]:
        """Return what decides which epoch is best; more is better."""
        return [-metrics["divergence"]]
