"""`distill`: from a text to a prompt that answers as the base does that has read it; and its report, made again."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.artifacts import CURVE_NAME, parse_object, read_bytes, write_atomically
from softprompt.data import read_source
from softprompt.display import training_curve
from softprompt.distillation import (
    REPORT_NAME,
    DistillationReport,
    Distilled,
    DistillSettings,
    Forecast,
    Question,
    SourceText,
    Store,
    Student,
    Teacher,
    answered,
    check_student,
    forecast_of,
    given_questions,
    measured_on,
    report_of,
    studied,
    taught,
    unrelated_pairs,
)
from softprompt.errors import ArtifactError, ConfigError, DataError, UsageError
from softprompt.fields import renamed
from softprompt.inference import TunedPrompt, load
from softprompt.progress import timed
from softprompt.training import (
    ANEW,
    LEAST_FALL,
    BaseLike,
    Session,
    StopSignal,
    checked_callbacks,
    claimed,
    clear_state,
    finish_trackers,
    identity,
    load_states,
    loaded,
    named_source,
    nothing_learnt,
    publish_logs,
    trackers_of,
)
from softprompt.world import joined, world

if TYPE_CHECKING:
    from torch import Tensor

    from softprompt.data import DataSource
    from softprompt.distillation import Text
    from softprompt.training import Prepared

logger = logging.getLogger(__name__)

QUESTIONS_NAME, HELD_OUT_NAME = "questions.jsonl", "held_out.jsonl"
"""The questions beside the finished prompt, those it was trained on and those kept apart, as data files."""


def distill(
    base_model: BaseLike = "demo",
    *,
    system_prompt: Text | None = None,
    documents: Sequence[Text] = (),
    examples: DataSource | None = None,
    questions: DataSource | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    report: bool = True,
    unrelated: DataSource | None = None,
    callbacks: Sequence[object] = (),
    **options: Any,
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
        resume: Continue the run that was interrupted in ``output``, with its own text, questions and settings.
        dry_run: Train nothing and write nothing, and return what the run would do.
        report: Measure the prompt at the end on the questions that were kept apart; its numbers go into
            ``distillation.json`` beside it, and the main ones into its record.
        unrelated: Records with answers that have nothing to do with the text, to measure damage on.
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
    called, target = checked_callbacks(callbacks), None if output is None else Path(output)
    sources = {"system_prompt": system_prompt, "documents": documents, "examples": examples, "questions": questions}
    with joined() as ranks, claimed(target, overwrite=overwrite, resume=resume, dry_run=dry_run):
        plan, settings, base_model, text = _begun(target, base_model, sources, options, resume=resume)
        target = target if ranks.is_main else None
        with timed(silent=settings.silence_progress_bars):
            base = loaded(base_model, settings.tuning(settings.configuration(chat=False)))
            teacher = Teacher.of(base, text, settings)
            given = [Question(**each) for each in plan.get("questions", ())]
            if questions is not None:
                given = given_questions(questions, teacher.rows, len(teacher.passages), settings)
            check_student(teacher, settings, given)
            if unrelated is not None:
                unrelated_pairs(unrelated := list(read_source(unrelated)))
            if dry_run:
                return forecast_of(teacher, settings, given)
            store = Store(target, plan or _plan(named_source(base_model), teacher, settings, text, given))
            store.check("fingerprint", _fingerprint(teacher))
            with StopSignal() as stop:
                if target is not None and not resume:
                    clear_state(target)
                    store.begin()
                distilled, found = _run(teacher, settings, given, store, stop, called)
                measured = None
                if report and not distilled.held_out.questions:
                    more = "give more questions=..., with answers where the base gives none"
                    way_out = more if settings.held_out else "raise held_out"
                    logger.warning("no question with a usable answer was kept apart to report on; %s", way_out)
                elif report:
                    with store.interrupted("while the prompt was measured"):
                        measured = report_of(distilled, found, unrelated=unrelated, check_stop=stop.check)
            return _finished(distilled, _files(found, settings), measured, target)


def _begun(
    target: Path | None, base_model: BaseLike, sources: Mapping[str, Any], options: dict[str, Any], *, resume: bool
) -> tuple[dict[str, Any], DistillSettings, BaseLike, SourceText]:
    """Return the plan of a run that is resumed, or none, its settings, its base and its text."""
    if resume:
        options = renamed(DistillSettings, options)
        plan = world().from_main(lambda: _resumed(target, base_model, {**sources, **options}))
        settings = DistillSettings.from_dict({**renamed(DistillSettings, plan["settings"]), **options})
        return plan, settings, plan["base_model"] or base_model, SourceText(**plan["text"])
    settings = DistillSettings.from_dict(options)
    if (sources["questions"] is None) == (settings.self_study is None):
        raise UsageError("expected questions=... (with answers or without) or self_study=N; give one of them")
    named = {name: sources[name] for name in ("system_prompt", "documents", "examples")}
    return {}, settings, base_model, SourceText.of(**named, columns=settings.columns)


def _fingerprint(teacher: Teacher) -> str:
    return str(teacher.base.fingerprint_record().get("short", ""))


def _plan(
    base_model: Any, teacher: Teacher, settings: DistillSettings, text: SourceText, given: Sequence[Question]
) -> dict[str, Any]:
    """Return all that a run is made of, as plain values."""
    return {
        "command": "distill",
        "base_model": base_model,
        "fingerprint": _fingerprint(teacher),
        "settings": settings.to_dict(),
        "text": asdict(text),
        "questions": [asdict(each) for each in given],
    }


def _resumed(output: Path | None, base_model: BaseLike, given: dict[str, Any]) -> dict[str, Any]:
    """Return the plan of the run that was interrupted in a folder: it has all that the run is made of but the base.

    Raises:
        UsageError: There is none, or something is given that could be another thing than the run has.
    """
    if output is None:
        raise UsageError("resume needs the output directory of the interrupted run")
    named = [name for name, each in given.items() if each and name not in (*ANEW, "device")]
    if named:
        raise UsageError(f"resume goes on with the run's own text, questions and settings; leave {named[0]} out")
    plan = dict(Store.found(output).plan)
    own, other = plan["base_model"], named_source(base_model)
    if own is not None and other not in ("demo", own):
        raise UsageError(f"resume goes on with the run's own base model, {own}; leave base_model out")
    return plan


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
    output, clock = store.output, [time.perf_counter()]
    with store.interrupted("while questions were answered"):
        stage = answered(given, teacher, store, stop.check) if given else None
        found = studied(settings, teacher, store, stop.check) if stage is None else stage
    clock.append(time.perf_counter())
    student = Student.of(teacher, found, settings, _recorded(_files(found, settings)))
    start = {name: value.clone() for name, value in student.prepared.module.state_dict().items()}
    with store.interrupted("while the teacher read the answers"):
        targets = taught(student.questions, student.asked, settings.top_k, teacher, store, stop.check)
    clock.append(time.perf_counter())
    prepared, held_out = student.taught(targets, settings.label_weight, stop.check)
    apart = len(held_out.questions)
    logger.info("%d questions to train on, %d kept apart", len(found) - apart, apart)
    trackers = trackers_of(settings.track or (), output, store.plan["settings"])
    before, _ = load_states(output, identity(prepared))
    with store.interrupted("at once", (KeyboardInterrupt,)):
        trained = Session(output, stop, before, [*callbacks, *trackers]).train({"": prepared})[""]
    with store.interrupted("while the prompt was measured"):
        problem = _back_to_start(prepared, start, trained.metrics)
    judged = [{**point, "loss": point["distillation"]} for point in trained.history]
    if problem := problem or nothing_learnt(prepared, trained.metrics, judged):
        trained.metrics["nothing_learnt"] = problem
        logger.warning("%s", problem)
    parts = {"questions": clock[1] - clock[0], "teacher": clock[2] - clock[1]}
    trained = trained.timed(parts, clock[2] - clock[0] + trained.metrics["seconds"])
    manifest = prepared.manifest(trained.metrics, trained.history)
    own = {"distillation": settings.to_dict(), "text_tokens": teacher.tokens, "text_sha256": teacher.digest}
    manifest = replace(manifest, settings=manifest.settings | own)
    tuned = TunedPrompt(prepared.base, prepared.module, prepared.config, manifest)
    finish_trackers(trackers, tuned, prepared.tasks)
    return Distilled(tuned, teacher, held_out), found


def _back_to_start(prepared: Prepared, start: Mapping[str, Tensor], metrics: dict[str, Any]) -> str | None:
    """Note how far the first values are from the teacher; put them back where all epochs are further, and say so.

    What training noted of the values that are given up is no sign of the prompt that is kept.
    """
    module, measure = prepared.module, None if prepared.goal is None else prepared.goal.measure
    if measure is None:
        return None
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(start)
    before, after = measure.metrics([module.prompt()]), metrics["validation"]
    metrics["start"] = before
    if before["divergence"] >= LEAST_FALL * after["divergence"]:
        module.load_state_dict(kept)
        return None
    metrics |= {"epoch": 0, "validation": before}
    metrics.pop("collapse", None)
    return (
        f"the prompt is kept as it started, {before['divergence']:.4f} nats from the text, its best epoch ended at "
        f"{after['divergence']:.4f}: lower learning_rate {metrics['learning_rate']:.3g}, or train for more epochs"
    )


def _finished(
    distilled: Distilled, files: Mapping[str, str], report: DistillationReport | None, target: Path | None
) -> TunedPrompt:
    """Write the prompt with its questions and its report, and remove the state."""
    tuned = distilled.tuned
    if report is not None:
        manifest = replace(tuned.whole, metrics={**tuned.whole.metrics, "distilled": report.metrics()})
        tuned = TunedPrompt(tuned.base, tuned.module, tuned.config, manifest)
    if target is not None:
        tuned.save(target, overwrite=True)
        (target / HELD_OUT_NAME).unlink(missing_ok=True)
        for name, text in files.items():
            write_atomically(target / name, text)
        (target / REPORT_NAME).unlink(missing_ok=True)
        if report is not None:
            report.write(target)
        with suppress(ConfigError):  # matplotlib is not installed
            (target / CURVE_NAME).unlink(missing_ok=True)
            training_curve(tuned.history, target / CURVE_NAME, start=tuned.metrics.get("start"))
        publish_logs(target, {"": target})  # last, for the lock goes with the state
    return tuned


def _files(questions: Sequence[Question], settings: DistillSettings) -> dict[str, str]:
    """Return the data files of questions by name: what is trained on and, if anything is, what is kept apart."""
    texts = dict.fromkeys((QUESTIONS_NAME, HELD_OUT_NAME), "")
    for each in questions:
        record = each.to_record(settings.columns)
        texts[HELD_OUT_NAME if each.held_out else QUESTIONS_NAME] += json.dumps(record, ensure_ascii=False) + "\n"
    return {name: text for name, text in texts.items() if text}


def _recorded(files: Mapping[str, str]) -> dict[str, Any]:
    """Return what a manifest says of data files."""
    named = {"train": QUESTIONS_NAME, "validation": HELD_OUT_NAME}
    return {
        use: {
            "path": name,
            "sha256": hashlib.sha256(files[name].encode()).hexdigest(),
            "rows": files[name].count("\n"),
        }
        for use, name in named.items()
        if name in files
    }


def measure_distilled(
    prompt: str | Path,
    *,
    system_prompt: Text | None = None,
    documents: Sequence[Text] = (),
    examples: DataSource | None = None,
    questions: DataSource | None = None,
    unrelated: DataSource | None = None,
    base_model: Any = None,
    input_field: str | None = None,
    output_field: str | None = None,
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
        input_field: Column of the questions, where they are other than those it was made with.
        output_field: Column of their answers, likewise.

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
    made, digest = (tuned.whole.settings.get(name) for name in ("text_tokens", "text_sha256"))
    if teacher.tokens != made or digest not in (None, teacher.digest):
        raise DataError(
            f"{prompt} was made of a text of {made} tokens, this is another of {teacher.tokens}; give that one"
        )
    paths = [path for name in (QUESTIONS_NAME, HELD_OUT_NAME) if (path := Path(prompt) / name).exists()]
    own = [question for path in paths for question in _read(path, settings.columns)]
    asked = [each for each in own if each.held_out]
    if questions is not None:
        every = replace(
            settings,
            held_out=0.0,
            early_stopping_patience=None,
            input_field=input_field or settings.input_field,
            output_field=output_field or settings.output_field,
        )
        asked = given_questions(questions, teacher.rows, len(teacher.passages), every)
    return report_of(measured_on(tuned, teacher, asked, top_k=settings.top_k), own, unrelated=unrelated)


def _read(path: Path, columns: Mapping[str, str | None]) -> list[Question]:
    """Read the questions beside a prompt.

    Raises:
        ArtifactError: The file is damaged.
    """
    try:
        records = [parse_object(each.decode(), path.name) for each in read_bytes(path).splitlines()]
        return [Question.of_record(each, columns) for each in records]
    except (ArtifactError, LookupError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); copy it again from the original") from error
