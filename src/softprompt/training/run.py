"""`tune`: from data to a prompt that can be used at once."""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Unpack, cast, overload

from softprompt.artifacts import CURVE_NAME, write_atomically
from softprompt.bundled import DEMO
from softprompt.display import training_curve
from softprompt.errors import ConfigError, UsageError, nearest
from softprompt.fields import default_of, renamed
from softprompt.inference import TunedPrompt
from softprompt.progress import timed
from softprompt.prompts import SOURCE_INITS, MultitaskPromptTuningConfig, MultitaskPromptTuningInit
from softprompt.training.events import checked_callbacks
from softprompt.training.examples import Data, TaskData, read_data
from softprompt.training.keywords import ALIASES, TuneOptions, full_names
from softprompt.training.output import (
    SEEDS_FOLDER,
    begun_by,
    claimed,
    clear_state,
    kept_if_resumable,
    remove_state,
    resume_command,
    state_path,
)
from softprompt.training.preparation import BaseLike, Prepared, prepare
from softprompt.training.rate_probe import with_rate
from softprompt.training.run_file import RUN_FILE, SWEEP, read_run, write_run
from softprompt.training.seeds import Seeded, train_seeds
from softprompt.training.session import Session, Trained, identity, stages_of
from softprompt.training.settings import TuneSettings
from softprompt.training.state import StopSignal, load_states
from softprompt.training.summary import DryRun, dry_run_of, summarize
from softprompt.training.tracking import Tracking, finish_trackers, trackers_of
from softprompt.training.tuning_config import TuningConfig
from softprompt.world import joined, world

logger = logging.getLogger(__name__)

ANEW = ("silence_progress_bars", "save_every")
"""Settings that a resumed run may be given anew."""


@overload
def tune(
    base_model: BaseLike = DEMO,
    train_data: Data | None = None,
    validation_data: Data | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: Literal[True],
    callbacks: Sequence[object] = (),
    **options: Unpack[TuneOptions],
) -> DryRun: ...
@overload
def tune(
    base_model: BaseLike = DEMO,
    train_data: Data | None = None,
    validation_data: Data | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: Literal[False] = False,
    callbacks: Sequence[object] = (),
    **options: Unpack[TuneOptions],
) -> TunedPrompt: ...
def tune(
    base_model: BaseLike = DEMO,
    train_data: Data | None = None,
    validation_data: Data | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    callbacks: Sequence[object] = (),
    **options: Unpack[TuneOptions],
) -> TunedPrompt | DryRun:
    """Tune a soft prompt for a frozen model and return it ready for use.

    Args:
        base_model: A folder, a model name, ``"demo"`` (the bundled model), or a loaded model.
        train_data: A data file or records: ``input`` and ``output``, or ``text`` and ``labels``; several
            as ``{task: data}``, which trains one source prompt for all of them.
        validation_data: The same, to choose the best epoch by; without it the validation split of a
            ``DatasetDict``, or ``validation_split`` of the training data.
        output: Directory to write the prompt to; without it nothing is written.
        overwrite: Write into an output directory that is not empty.
        resume: Continue the run that was interrupted in ``output``, with its own settings.
        dry_run: Train nothing and write nothing, and return what the run would do.
        callbacks: Objects (or classes) called as transformers' Trainer calls a ``TrainerCallback``; see
            docs/training.md.
        **options: The fields of `TuneSettings`. What the prompt is, is said by ``config``, such as
            ``PrefixTuningConfig(num_virtual_tokens=8)``, or by ``method`` and ``tuning_config``; ``lr`` is
            another name of ``learning_rate``, ``init`` of tuning_config's ``prompt_tuning_init_method``.

    Raises:
        ConfigError: An unknown or contradictory setting.
        DataError: Data that cannot be read, or does not fit the verbalizer.
        BackboneError: A base model that cannot be loaded, or a row that exceeds its context.
        OutputExistsError: The output directory is not empty.
        TrainingError: The loss is not finite, or there is nothing to resume.
        TrainingInterrupted: Ctrl-C or SIGTERM; the state is saved when there is an ``output``.
    """
    called, target = checked_callbacks(callbacks), None if output is None else Path(output)
    settings, given = None, renamed(TuneSettings, options)
    if not resume:
        _check_names(given)
        settings = TuneSettings.from_dict(given)
    with joined() as ranks, claimed(target, overwrite=overwrite, resume=resume, dry_run=dry_run):
        if settings is None:
            plan = resumed("tune", base_model, train_data, validation_data, target, given)
        else:
            plan = RunPlan(base_model, train_data, validation_data, settings)
        return _tuned(plan, target if ranks.is_main else None, called, resume=resume, dry_run=dry_run)


def _tuned(
    plan: RunPlan, target: Path | None, called: Sequence[object], *, resume: bool, dry_run: bool
) -> TunedPrompt | DryRun:
    """Run a plan, or say what it would do."""
    clock = time.perf_counter()
    trackers, data = plan.trackers(target), plan.data()
    with timed(silent=plan.settings.silence_progress_bars) as parts:
        prepared = prepare(plan.base_model, data, plan.settings)
        stages = list(stages_of(prepared, {}, lambda: None))
        summarize(prepared, stages)
        if dry_run:
            return dry_run_of(prepared, stages)
        known = identity(prepared)
        found, _ = load_states(target if resume else None, known)
        before = sum(each.seconds for each in found.values())
        # From here on a Ctrl-C is noted, so the run's file and its first state are written together.
        with StopSignal() as stop, kept_if_resumable(target):
            if target is not None and not resume:
                plan.begin(target)
            prepared, probed = with_rate(prepared, target, stop.check)
            best, seeds = train_seeds(prepared, Session(target, stop, found, [*called, *trackers]))
    seeds[best].trained.metrics.update(probed)
    if problem := seeds[best].nothing_learnt:
        seeds[best].trained.metrics["nothing_learnt"] = problem
        logger.warning("%s", problem)
    trained = seeds[best].trained.timed(parts, before + time.perf_counter() - clock)
    tuned = tuned_of(seeds[best].prepared, trained)
    if target is not None:
        _write_all(target, plan, best, seeds, tuned)
    finish_trackers(trackers, tuned, prepared.tasks)
    return tuned


def _check_names(options: Mapping[str, Any]) -> None:
    """Refuse a name that neither ``tune`` nor its settings have.

    Raises:
        ConfigError: The nearest known name is named.
    """
    known = list(inspect.signature(tune).parameters)
    for name in options:
        if name not in known and name not in TuningConfig.__dataclass_fields__:
            raise ConfigError(f"tune has no argument {name!r}{nearest(name, known)}; see help(tune)")


def _write_all(target: Path, plan: RunPlan, best: str, seeds: Mapping[str, Seeded], tuned: TunedPrompt) -> None:
    """Write the best prompt, those of the other seeds where several were wanted, and their logs."""
    folders = {best: target}
    if plan.settings.seeds > 1:
        folders |= {seed: target / SEEDS_FOLDER / seed for seed in seeds if seed != best}
    for seed, folder in reversed(folders.items()):
        each = tuned if seed == best else tuned_of(seeds[seed].prepared, seeds[seed].trained)
        settings = plan.settings if seed == best else seeds[seed].prepared.settings
        write_output(each, folder, plan.names(), settings)
    publish_logs(target, folders)


def tuned_of(prepared: Prepared, trained: Trained) -> TunedPrompt:
    """Return a trained prompt, ready for use."""
    config = prepared.config
    if isinstance(config, MultitaskPromptTuningConfig) and config.prompt_tuning_init in SOURCE_INITS:
        # A saved prompt must load where its source is not.
        config.prompt_tuning_init = MultitaskPromptTuningInit.RANDOM
        config.prompt_tuning_init_state_dict_path = None
        config.prompt_tuning_init_task = 0
    manifest = prepared.manifest(trained.metrics, trained.history)
    return TunedPrompt(prepared.base, prepared.module, config, manifest)


def write_output(tuned: TunedPrompt, target: Path, sources: Mapping[str, Any], settings: TuneSettings) -> None:
    """Write a finished prompt, the run file that repeats it, and its curve."""
    tuned.save(target, overwrite=True)
    write_run(target / RUN_FILE, sources, settings)
    with suppress(ConfigError):  # matplotlib is not installed
        (target / CURVE_NAME).unlink(missing_ok=True)
        training_curve(tuned.whole.history, target / CURVE_NAME)


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run is made of, before anything is read."""

    base_model: BaseLike
    train_data: Data | None
    validation_data: Data | None
    settings: TuneSettings
    sweep: Mapping[str, Any] | None = None

    def names(self) -> dict[str, Any]:
        """Return what the run file says of the sources; None for what was in memory."""
        named = {"base_model": named_source(self.base_model), "train_data": named_source(self.train_data)}
        if self.validation_data is not None:
            named["validation_data"] = named_source(self.validation_data)
        return named

    def data(self) -> list[TaskData]:
        """Read and check the data sets; raises as ``read_data``, and ``UsageError`` where there is none."""
        if self.train_data is None:
            raise UsageError("train_data is missing; give a data file or records of input and output")
        return read_data(self.train_data, self.validation_data, self.settings)

    def begin(self, output: Path) -> None:
        """Write the run file into the state of an output, where nothing of an earlier run is left."""
        clear_state(output)
        write_run(state_path(output).with_name(RUN_FILE), self.names(), self.settings, self.sweep)

    def trackers(self, output: Path | None) -> list[Tracking]:
        """Return the callback that sends the run to trackers, where it has any; raises as ``trackers_of``."""
        known = self.names() | self.settings.to_dict() | ({"sweep": self.sweep} if self.sweep else {})
        return trackers_of(self.settings.track, output, known) if self.settings.track else []


def named_source(source: BaseLike | Data | None) -> str | dict[str, str | None] | None:
    """Return a path that means the same from every directory, or a name as it is.

    Data sets by task give their names by task; None is what was in memory.
    """
    if isinstance(source, Mapping):
        return {task: cast(str | None, named_source(rows)) for task, rows in source.items()}
    if not isinstance(source, str | Path) or str(source) == "-":  # standard input is read once
        return None
    return os.path.abspath(source) if os.path.exists(source) else str(source)


def resumed(
    command: str,
    base_model: BaseLike,
    train_data: Data | None,
    validation_data: Data | None,
    output: Path | None,
    options: dict[str, Any],
) -> RunPlan:
    """Return the plan of the run of a command that was interrupted in ``output``."""
    saved = world().from_main(lambda: _saved(command, output))
    names: dict[str, Any] = {
        name: named_source(saved.pop(name, None)) for name in ("base_model", "train_data", "validation_data")
    }
    sweep = saved.pop(SWEEP, None)
    settings = _same_settings(TuneSettings.from_dict(saved), options)
    if names["base_model"] is None and base_model == DEMO:
        raise UsageError("the interrupted run used a model in memory; give base_model again")
    given_base = None if base_model == DEMO else base_model
    given_data = {"base_model": given_base, "train_data": train_data, "validation_data": validation_data}
    for name, given in given_data.items():
        if given is not None and names[name] not in (None, named_source(given)):
            raise ConfigError(f"the interrupted run has {name} {names[name]}; leave {name} out")
    return RunPlan(
        base_model if names["base_model"] is None else names["base_model"],
        names["train_data"] or train_data,
        names["validation_data"] or validation_data,
        settings,
        sweep,
    )


def _saved(command: str, output: Path | None) -> dict[str, Any]:
    """Return the run file of the run of a command that was interrupted in ``output``."""
    if output is None:
        raise UsageError("resume needs the output directory of the interrupted run")
    if begun_by(output) != command:
        advice = f"continue with {resume_command(output)}" if begun_by(output) else "start it without resume=True"
        raise UsageError(f"nothing to resume in {output}: it holds no interrupted run of {command}; {advice}")
    return read_run(state_path(output).with_name(RUN_FILE))


def _same_settings(saved: TuneSettings, options: dict[str, Any]) -> TuneSettings:
    """Return the saved settings; only what changes nothing of the prompt, as ``ANEW`` names it, may be set anew.

    Raises:
        ConfigError: A setting differs from the interrupted run's.
    """
    anew = {name: options.pop(name) for name in ANEW if name in options}
    if options:
        given = TuneSettings.from_dict({**saved.to_dict(), **full_names(options)})
        for item in fields(TuneSettings):
            was, now = getattr(saved, item.name), getattr(given, item.name)
            if was != now:
                raise ConfigError(
                    f"the interrupted run has {item.name} {was!r}, not {now!r}; leave it out to "
                    "resume, or start again with overwrite=True"
                )
    return replace(saved, **anew)


def publish_logs(output: Path, folders: Mapping[str, Path]) -> None:
    """Copy the logs of finished runs, by seed, out of the state of ``output``, and remove that."""
    for seed, folder in folders.items():
        before = f"{seed}." if seed else ""
        for log in sorted(state_path(output).parent.glob(f"{before}*.jsonl")):
            write_atomically(folder / log.name.removeprefix(before), log.read_bytes())
    remove_state(output)


def _signature() -> inspect.Signature:
    """Return the signature with every option by name and default, for help() and editors."""
    written = inspect.signature(tune)
    named = [p for p in written.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=default_of(item), annotation=item.type)
        for item in fields(TuneSettings)
    ]
    aliases = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ALIASES]
    return written.replace(parameters=[*named, *options, *aliases])


tune.__signature__ = _signature()  # type: ignore[attr-defined]
