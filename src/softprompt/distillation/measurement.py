"""A finished distillation, measured again: on what it kept apart, or on other questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.artifacts import read_bytes
from softprompt.distillation import (
    QUESTIONS_NAME,
    DistillationReport,
    DistillSettings,
    Question,
    SourceText,
    Teacher,
    given_questions,
    measured_on,
    report_of,
)
from softprompt.errors import ArtifactError, ConfigError, DataError
from softprompt.inference import load

if TYPE_CHECKING:
    from softprompt.data import DataSource
    from softprompt.distillation import Text


def measure_distilled(
    prompt: str | Path,
    *,
    system_prompt: Text | None = None,
    documents: Sequence[Text] = (),
    examples: DataSource | None = None,
    questions: DataSource | None = None,
    unrelated: DataSource | None = None,
    base_model: Any = None,
) -> DistillationReport:
    """Measure a finished prompt again, perhaps on other questions; nothing is written.

    Args:
        prompt: Directory that ``distill`` wrote.
        system_prompt: The text it was made of, as for ``distill``; it is not kept with the prompt.
        documents: Likewise.
        examples: Likewise.
        questions: Records to measure on, with answers or without; None takes those that were kept apart.
        unrelated: As for ``distill``.
        base_model: As for ``load``.

    Raises:
        ConfigError: The prompt was not made by ``distill``.
        DataError: No question was kept apart, or the text or the questions cannot be used.
        ArtifactError: The directory cannot be read.
    """
    tuned = load(prompt, base_model)
    if not isinstance(recorded := tuned.whole.settings.get("distillation"), dict):
        raise ConfigError(f"{prompt} was not made by distill; evaluate measures other prompts")
    settings = DistillSettings.from_dict(recorded)
    text = SourceText.of(system_prompt, documents, examples, settings.columns)
    teacher = Teacher.of(tuned.base, text, settings)
    path = Path(prompt) / QUESTIONS_NAME
    try:
        own = [Question.from_dict(json.loads(each)) for each in read_bytes(path).splitlines()]
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); copy it again from the original") from error
    asked = [each for each in own if each.held_out]
    if questions is not None:
        every = replace(settings, held_out=0.0, early_stopping_patience=None)
        asked = given_questions(questions, teacher.rows, len(teacher.passages), every)
    elif teacher.tokens != (made := tuned.whole.settings.get("text_tokens")):
        raise DataError(
            f"{prompt} was made of a text of {made} tokens, this one has {teacher.tokens}; give that one"
        )
    return report_of(measured_on(tuned, teacher, asked, top_k=settings.top_k), len(own), unrelated=unrelated)
