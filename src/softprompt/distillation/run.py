"""`distill`: from a text to a prompt that answers as the base does that has read it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Unpack, overload

from softprompt.artifacts import CURVE_NAME, write_atomically
from softprompt.backbone import freeze
from softprompt.bundled import DEMO
from softprompt.data import DataSource
from softprompt.display import training_curve
from softprompt.distillation.forecast import Forecast, forecast_of
from softprompt.distillation.held_out import Distilled
from softprompt.distillation.questions import Question, given_questions
from softprompt.distillation.settings import DistillOptions, DistillSettings
from softprompt.distillation.stages import answered, studied, taught
from softprompt.distillation.store import QUESTIONS_NAME, Store, plan_of
from softprompt.distillation.student import Student
from softprompt.distillation.teacher import Teacher
from softprompt.distillation.texts import Reading, Text
from softprompt.errors import ConfigError, UsageError
from softprompt.inference import TunedPrompt
from softprompt.progress import timed
from softprompt.training import (
    BaseLike,
    StopSignal,
    check_output,
    checked_callbacks,
    identity,
    load_state,
    loaded,
    named_source,
    nothing_learnt,
    publish_logs,
    remove_state,
    run_stages,
    state_path,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sources:
    """What a run is made of, before anything is read."""

    base_model: BaseLike
    system_prompt: Text | None
    documents: tuple[Text, ...]
    examples: DataSource | None
    questions: DataSource | None

    def named(self) -> dict[str, Any]:
        """Return how each that is given is found again: a file, a text, or None for what was in memory."""
        found: dict[str, Any] = {"base_model": named_source(self.base_model)}
        if self.system_prompt is not None:
            found["system_prompt"] = _kept(self.system_prompt)
        if self.documents:
            found["documents"] = [_kept(each) for each in self.documents]
        given = {"examples": self.examples, "questions": self.questions}
        return found | {name: named_source(each) for name, each in given.items() if each is not None}


def _kept(text: Text) -> dict[str, str]:
    return {"file": os.path.abspath(text)} if isinstance(text, Path) else {"text": text}


def _text_of(kept: Mapping[str, str]) -> Text:
    return Path(kept["file"]) if "file" in kept else kept["text"]


@overload
def distill(
    base_model: BaseLike = DEMO,
    *,
    system_prompt: Text | None = None,
    documents: Sequence[Text] = (),
    examples: DataSource | None = None,
    questions: DataSource | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: Literal[True],
    callbacks: Sequence[object] = (),
    **options: Unpack[DistillOptions],
) -> Forecast: ...
@overload
def distill(
    base_model: BaseLike = DEMO,
    *,
    system_prompt: Text | None = None,
    documents: Sequence[Text] = (),
    examples: DataSource | None = None,
    questions: DataSource | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: Literal[False] = False,
    callbacks: Sequence[object] = (),
    **options: Unpack[DistillOptions],
) -> TunedPrompt: ...
def distill(
    base_model: BaseLike = DEMO,
    *,
    system_prompt: Text | None = None,
    documents: Sequence[Text] = (),
    examples: DataSource | None = None,
    questions: DataSource | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    callbacks: Sequence[object] = (),
    **options: Unpack[DistillOptions],
) -> TunedPrompt | Forecast:
    """Distil a text into a prompt: the base with the prompt answers as the base does that has read the text.

    Args:
        base_model: A folder, a model name, ``"demo"`` (the bundled model), or a loaded model.
        system_prompt: The text; a ``Path`` is a file that holds it.
        documents: Texts that are cut into chunks where they are too long; likewise.
        examples: Records with targets, which the teacher sees as demonstrations.
        questions: Records of what the teacher is asked, with answers or without; instead of ``self_study``.
        output: Directory to write the prompt to; without it nothing is written.
        overwrite: Write into an output directory that is not empty.
        resume: Continue the run that was interrupted in ``output``, with its own settings.
        dry_run: Train nothing and write nothing, and return what the run would do.
        callbacks: As for ``tune``.
        **options: The fields of `DistillSettings`; ``lr`` is another name of ``learning_rate``.

    Raises:
        ConfigError: An unknown or contradictory setting.
        DataError: A text, examples or questions that cannot be used.
        ContextOverflowError: The text does not fit into the context.
        OutputExistsError: The output directory is not empty.
        TrainingError: The loss is not finite, or there is nothing to resume.
        TrainingInterrupted: Ctrl-C or SIGTERM; what is done is saved when there is an ``output``.
    """
    called = checked_callbacks(callbacks)
    target = None if output is None else Path(output)
    sources = Sources(base_model, system_prompt, tuple(documents), examples, questions)
    if resume:
        if overwrite or target is None:
            raise UsageError("resume goes on with the run in output: give output, and leave overwrite out")
        sources, settings = _resumed(sources, target, options)
    else:
        settings = DistillSettings.from_dict(options)
        if not dry_run:
            check_output(target, overwrite=overwrite)
    if (sources.questions is None) == (settings.self_study is None):
        raise UsageError("expected questions (with answers or without) or self_study N; give one of them")
    columns = {"input_field": settings.input_field, "output_field": settings.output_field}
    reading = Reading.of(sources.system_prompt, sources.documents, sources.examples, **columns)
    with timed(silent=settings.silence_progress_bars):
        base = loaded(sources.base_model, settings.tuning(settings.configuration(chat=False)))
        freeze(base.model)
        teacher = Teacher.of(base, reading, settings)
        given = _given(sources, settings, teacher, columns)
        logger.info(
            "the teacher reads %s tokens (%s) in %d passages",
            f"{teacher.tokens:,}",
            reading.kind,
            len(teacher.passages),
        )
        if dry_run:
            return forecast_of(teacher, settings, given)
        parts = {
            "base model fingerprint": base.fingerprint_record().get("short", ""),
            f"{reading.kind} sha256": reading.digest(),
            "questions sha256": hashlib.sha256(repr(given).encode()).hexdigest(),
        }
        store = Store(target, parts)
        with StopSignal() as stop:
            if resume:
                store.check()
            elif target is not None:
                remove_state(target)
                store.begin({"sources": sources.named(), "settings": settings.to_dict()})
            distilled, found = _run(teacher, settings, given, store, stop, called)
        return _finished(distilled, found, target)


def _resumed(given: Sources, output: Path, options: Mapping[str, Any]) -> tuple[Sources, DistillSettings]:
    """Return the sources and settings of the run that was interrupted in a folder.

    Raises:
        UsageError: There is none, or something of it was in memory and is not given again.
        ConfigError: A setting or a source is another one.
    """
    plan = plan_of(output)
    saved, settings = plan["sources"], DistillSettings.from_dict(plan["settings"])
    now = DistillSettings.from_dict({**plan["settings"], **options})
    silent = now.silence_progress_bars
    if replace(now, silence_progress_bars=settings.silence_progress_bars) != settings:
        name = next(name for name in options if options[name] != plan["settings"].get(name))
        raise ConfigError(f"the interrupted run has another {name}; leave it out to resume, or use overwrite=True")
    named = given.named()
    for name in ("system_prompt", "documents", "examples", "questions"):
        if name in named and (name not in saved or saved[name] not in (None, named[name])):
            raise ConfigError(f"the interrupted run has another {name}; leave it out to resume")
    for name in (name for name, each in saved.items() if each is None):
        if name not in named or (name == "base_model" and given.base_model == DEMO):
            raise UsageError(f"the interrupted run has {name} that was in memory; give it again")
    sources = Sources(
        saved["base_model"] or given.base_model,
        _text_of(saved["system_prompt"]) if "system_prompt" in saved else None,
        tuple(_text_of(each) for each in saved.get("documents", ())),
        saved.get("examples") or given.examples,
        saved.get("questions") or given.questions,
    )
    return sources, replace(settings, silence_progress_bars=silent)


def _given(
    sources: Sources, settings: DistillSettings, teacher: Teacher, columns: Mapping[str, str | None]
) -> list[Question]:
    if sources.questions is None:
        return []
    return given_questions(
        sources.questions,
        teacher.rows.verbalizer,
        chat=teacher.manifest.chat,
        passages=len(teacher.passages),
        held_out=settings.held_out,
        seed=settings.seed,
        **columns,
    )


def _run(
    teacher: Teacher,
    settings: DistillSettings,
    given: Sequence[Question],
    store: Store,
    stop: StopSignal,
    callbacks: Sequence[object],
) -> tuple[Distilled, list[Question]]:
    """Run the stages, each from where it was; return what came of it, and all questions.

    Raises:
        TrainingInterrupted: With the command that goes on.
    """
    output, clock, parts = store.output, time.perf_counter(), dict[str, float]()
    with store.interrupted("while questions were answered"):
        found = (
            answered(given, teacher, store, stop.check) if given else studied(settings, teacher, store, stop.check)
        )
    parts["questions"] = time.perf_counter() - clock
    digest = hashlib.sha256(_lines(found).encode()).hexdigest()
    student = Student.of(
        teacher, found, settings, {"train": {"path": QUESTIONS_NAME, "sha256": digest, "rows": len(found)}}
    )
    clock = time.perf_counter()
    with store.interrupted("while the teacher read the answers"):
        targets = taught(student.questions, student.asked, settings.top_k, teacher, store, stop.check)
    parts["teacher"] = time.perf_counter() - clock
    prepared, held_out = student.taught(targets, settings.label_weight, stop.check)
    logger.info(
        "%d questions to train on, %d kept apart", len(student.prepared.tasks[0].train), len(held_out.questions)
    )
    before = None
    if output is not None and state_path(output).exists():
        before = load_state(output, identity(prepared))
    with store.interrupted("at once"):
        trained = run_stages(prepared, output, stop, before, callbacks)
    if problem := nothing_learnt(prepared, trained.metrics, trained.history):
        trained.metrics["nothing_learnt"] = problem
        logger.warning("%s", problem)
    trained = trained.timed(parts, sum(parts.values()) + trained.metrics["seconds"])
    manifest = prepared.manifest(trained.metrics, trained.history)
    own = {"distillation": settings.to_dict(), "text_tokens": teacher.tokens}
    tuned = TunedPrompt(
        prepared.base, prepared.module, prepared.config, replace(manifest, settings=manifest.settings | own)
    )
    return Distilled(tuned, teacher, held_out), found


def _finished(distilled: Distilled, questions: Sequence[Question], target: Path | None) -> TunedPrompt:
    """Write the prompt with its questions, and remove the state."""
    tuned = distilled.tuned
    if target is not None:
        tuned.save(target, overwrite=True)
        write_atomically(target / QUESTIONS_NAME, _lines(questions))
        publish_logs(target)
        with suppress(ConfigError):  # matplotlib is not installed
            (target / CURVE_NAME).unlink(missing_ok=True)
            training_curve(tuned.history, target / CURVE_NAME)
    return tuned


def _lines(questions: Sequence[Question]) -> str:
    return "".join(json.dumps(each.to_dict(), ensure_ascii=False) + "\n" for each in questions)
