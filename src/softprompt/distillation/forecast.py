"""The dry run of a distillation: its tokens, rows, memory and time, from one pass of each stage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, final

import torch

from softprompt.distillation import Student, Study
from softprompt.generation import GenerationOptions
from softprompt.training import DryRun, TopTargets, dry_run_of, duration, stages_of

if TYPE_CHECKING:
    from softprompt.distillation import DistillSettings, Question, Teacher

_TIMED = 8
"""Tokens of the answers whose generation is timed."""


@final
@dataclass(frozen=True, slots=True)
class Forecast:
    """What a distillation would do; nothing was trained and nothing written.

    Attributes:
        text_tokens: Tokens of the text.
        passages: Passages that the teacher reads, each by itself.
        questions: Questions to train on.
        held_out: Questions to keep apart.
        generated: Texts to generate: questions of self-study, and answers.
        target_bytes: Bytes of the teacher's log-probabilities on disk.
        seconds: What each stage would take, with answers of half the maximum length.
        training: What the training would do.
    """

    text_tokens: int
    passages: int
    questions: int
    held_out: int
    generated: int
    target_bytes: int
    seconds: dict[str, float]
    training: DryRun

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {duration(value)}" for name, value in self.seconds.items())
        return (
            f"text: {self.text_tokens:,} tokens, passages: {self.passages:,}\n"
            f"questions: {self.questions:,} to train on, {self.held_out:,} kept apart; texts to generate: "
            f"{self.generated:,}\nteacher's log-probabilities: {self.target_bytes / 1e6:,.1f} MB\n"
            f"by stage, about: {stages}\n{self.training}"
        )


def forecast_of(teacher: Teacher, settings: DistillSettings, given: Sequence[Question]) -> Forecast:
    """Return what a distillation would do; questions and answers that are not there yet are stood in for.

    Args:
        teacher: The teacher.
        settings: The settings.
        given: Questions that were given; none for self-study.
    """
    asked = list(given)
    if not given:
        study = Study.of(settings, teacher.manifest.chat, len(teacher.passages))
        seeds = [study.seed_of(n, apart=apart) for apart in (False, True) for n in range(study.counts[apart])]
        asked = [replace(each, request={**each.request, "number": n}) for n, (each, _) in enumerate(seeds)]
    generated = sum(each.answer is None for each in asked) * (1 if given else 2)
    stand_in = _text(teacher, settings.max_target_length // 2)
    answered = [replace(each, answer=each.answer or stand_in, scores={}) for each in asked]
    student = Student.of(teacher, answered, settings, {})
    batch, passes = slice(0, settings.batch_size), -(-len(asked) // settings.batch_size)
    seconds, started = {}, time.perf_counter()
    if generated and teacher.manifest.labels is None:
        options = GenerationOptions(max_new_tokens=_TIMED, min_new_tokens=_TIMED)
        teacher.generate([(each, options) for each in asked[batch]])
        of_a_batch = (time.perf_counter() - started) / _TIMED * settings.max_target_length / 2
        seconds["questions"] = of_a_batch * generated / min(len(asked), settings.batch_size)
    started = time.perf_counter()
    teacher.targets(student.questions[batch], student.asked[batch], settings.top_k, lambda: None)
    seconds["teacher"] = (time.perf_counter() - started) * passes
    k = min(settings.top_k, teacher.base.facts.vocabulary)
    flat = [TopTargets(torch.arange(k).expand(n, k), -torch.ones(n, k), -torch.ones(n)) for n in student.lengths]
    prepared, held_out = student.taught(flat, settings.label_weight, lambda: None)
    training = dry_run_of(prepared, list(stages_of(prepared, {}, lambda: None)))
    return Forecast(
        text_tokens=teacher.tokens,
        passages=len(teacher.passages),
        questions=len(asked) - len(held_out.questions),
        held_out=len(held_out.questions),
        generated=generated,
        target_bytes=sum(student.lengths) * (8 * k + 4),
        seconds={**seconds, "training": training.seconds},
        training=training,
    )


def _text(teacher: Teacher, tokens: int) -> str:
    """Return some text of about as many tokens; the first label where there are labels."""
    if teacher.manifest.labels:
        return teacher.manifest.labels[0]
    ids = teacher.passages[0].ids
    return teacher.rows.decode((ids * -(-tokens // len(ids)))[:tokens]).strip() or "a"
