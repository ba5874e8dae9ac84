"""The dry run of a distillation: its tokens, rows, memory and time, from one pass of each stage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, final

import torch

from softprompt.distillation.questions import OTHER_SEEDS, SEEDS, Question
from softprompt.distillation.settings import DistillSettings
from softprompt.distillation.student import Student
from softprompt.distillation.teacher import Teacher
from softprompt.generation import GenerationOptions
from softprompt.training import DryRun, TopTargets, dry_run_of, duration, stages_of

_MEASURED_TOKENS = 8
"""Tokens of the answers whose generation is timed."""
_BYTES_PER_TOKEN = 8
"""Of an id and a log-probability."""


@final
@dataclass(frozen=True, slots=True)
class Forecast:
    """What a distillation would do; nothing was trained and nothing written.

    Attributes:
        text_tokens: Tokens of the text.
        passages: Passages that the teacher reads, each by itself.
        questions: Questions to train on.
        held_out: Questions to keep apart.
        unanswered: Answers to generate, and questions to ask, at most.
        target_bytes: Bytes of the teacher's log-probabilities on disk, at most.
        seconds: What each stage would take, generation at most: its answers may end earlier.
        training: What the training would do.
    """

    text_tokens: int
    passages: int
    questions: int
    held_out: int
    unanswered: int
    target_bytes: int
    seconds: dict[str, float]
    training: DryRun

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        passages = "" if self.passages == 1 else f" in {self.passages:,} passages"
        stages = ", ".join(f"{name} {duration(value)}" for name, value in self.seconds.items())
        return "\n".join(
            [
                f"text: {self.text_tokens:,} tokens{passages}",
                f"questions: {self.questions:,} to train on, {self.held_out:,} kept apart, "
                f"{self.unanswered:,} texts to generate",
                f"teacher's log-probabilities: at most {self.target_bytes / 1e6:,.1f} MB",
                f"seconds by stage, at most: {stages}",
                str(self.training),
            ]
        )


def forecast_of(teacher: Teacher, settings: DistillSettings, given: Sequence[Question]) -> Forecast:
    """Return what a distillation would do; questions that are not there yet are stood in for.

    Args:
        teacher: The teacher.
        settings: The settings.
        given: Questions that were given; none for self-study.
    """
    count = settings.self_study or 0
    apart = max(1, round(settings.held_out * count)) if settings.held_out and count else 0
    asked = list(given) or [
        *_stand_ins(teacher, SEEDS, count, False),
        *_stand_ins(teacher, OTHER_SEEDS, apart, True),
    ]
    unanswered = sum(each.answer is None for each in asked)
    stand_in = _text(teacher, settings.max_target_length // 2)
    answered = [replace(each, answer=stand_in) if each.answer is None else each for each in asked]
    student = Student.of(teacher, answered, settings, {})
    batch = slice(0, settings.batch_size)
    started = time.perf_counter()
    teacher.targets(student.questions[batch], student.asked[batch], settings.top_k, lambda: None)
    passes = -(-len(asked) // settings.batch_size)
    seconds = {"teacher": (time.perf_counter() - started) * passes}
    generated = unanswered * (2 if not given else 1)
    if generated and teacher.manifest.labels is None:
        options = GenerationOptions(max_new_tokens=_MEASURED_TOKENS, min_new_tokens=_MEASURED_TOKENS)
        started = time.perf_counter()
        teacher.generate([(each, options) for each in asked[batch]])
        each_token = (time.perf_counter() - started) / _MEASURED_TOKENS
        seconds = {"questions": each_token * settings.max_target_length * generated / len(asked[batch])} | seconds
    targets = [_uniform(len(row.target), settings.top_k) for row in student.rows]
    prepared, _ = student.taught(targets, settings.label_weight, lambda: None)
    training = dry_run_of(prepared, list(stages_of(prepared, {}, lambda: None)))
    tokens = sum(len(row.target) for row in student.rows)
    return Forecast(
        text_tokens=teacher.tokens,
        passages=len(teacher.passages),
        questions=sum(not each.held_out for each in asked),
        held_out=sum(each.held_out for each in asked),
        unanswered=generated,
        target_bytes=tokens * (settings.top_k * _BYTES_PER_TOKEN + 4),
        seconds=seconds | {"training": training.seconds},
        training=training,
    )


def _stand_ins(teacher: Teacher, seeds: dict[str, tuple[str, ...]], count: int, apart: bool) -> list[Question]:
    texts = [text for each in seeds.values() for text in each]
    chat = teacher.manifest.chat
    return [
        Question(
            {"messages": [{"role": "user", "content": f"{n} {texts[n % len(texts)]}"}]}
            if chat
            else {"input": f"{n} {texts[n % len(texts)]}"},
            None,
            n % len(teacher.passages),
            held_out=apart,
        )
        for n in range(count)
    ]


def _text(teacher: Teacher, tokens: int) -> str:
    """Return some text of about as many tokens; the first label where there are labels."""
    if teacher.manifest.labels:
        return teacher.manifest.labels[0]
    ids = teacher.passages[0].ids
    return teacher.rows.decode((ids * -(-tokens // len(ids)))[:tokens]).strip() or "a"


def _uniform(tokens: int, k: int) -> TopTargets:
    return TopTargets(
        torch.arange(k, dtype=torch.int32).expand(tokens, k),
        torch.full((tokens, k), -3.0),
        torch.full((tokens,), -3.0),
    )
