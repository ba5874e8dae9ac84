"""`sweep`: the best rate, length, initialisation and method of a prompt, by successive halving."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, final

from softprompt.artifacts import write_atomically
from softprompt.bundled import DEMO
from softprompt.cluster import connected
from softprompt.display import png_of, sweep_figure
from softprompt.errors import ConfigError, UsageError
from softprompt.fields import from_mapping, plain, renamed
from softprompt.inference import TunedPrompt
from softprompt.progress import timed
from softprompt.training import (
    LOG_FILE,
    PLAN_FILE,
    SEAL,
    BaseLike,
    Data,
    RunPlan,
    StopSignal,
    TuneOptions,
    TuneSettings,
    claimed,
    finish_trackers,
    identity,
    kept_if_resumable,
    load_states,
    prepare,
    publish_logs,
    quality_of,
    require_alike,
    resumed,
    state_path,
    summarize,
    tuned_of,
    write_output,
    write_sealed,
)
from softprompt.training.sweeps.halving import Halving, Tried, steps_of_rungs, unsaid
from softprompt.training.sweeps.on_ray import rungs_on_ray
from softprompt.training.sweeps.space import (
    TRIALS,
    Combination,
    SweepSettings,
    grid_of,
    optuna_of,
    refuse_ignored,
    suggested,
)
from softprompt.world import joined

logger = logging.getLogger(__name__)

SWEEP_FILE, SWEEP_FIGURE = "sweep.json", "sweep.png"


@final
@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep found.

    Attributes:
        prompt: The best prompt, trained to the full steps.
        candidates: All that was tried, the best first.
        rungs: Steps at the end of each rung.
        by: The metric that decided.
    """

    prompt: TunedPrompt
    candidates: Sequence[Tried]
    rungs: Sequence[int]
    by: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, as ``sweep.json`` has them."""
        found = [each.to_dict() for each in self.candidates]
        return {"by": self.by, "rungs": list(self.rungs), "best": self.candidates[0].name, "candidates": found}

    def __str__(self) -> str:
        names = ("candidate", "method", "init", "tokens", "rate", "learning rate", "steps", self.by, "loss")
        lines = [names, *(self._line(each) for each in self.candidates)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join(row.rstrip() for row in rows)

    def _line(self, tried: Tried) -> tuple[str, ...]:
        choice, last = tried.choice, tried.points[-1] if tried.points else None
        said = [tried.name, choice.method, choice.init or "-", str(choice.length or "-"), choice.learning_rate]
        said += [f"{tried.learning_rate:.4g}", str(last["steps"]) if last else "-"]
        if last is None:
            return *said, "not finite", "-"
        return *said, f"{last['validation'][self.by]:.4f}", f"{last['validation']['loss']:.4f}"


def sweep(
    base_model: BaseLike = DEMO,
    train_data: Data | None = None,
    validation_data: Data | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    space: SweepSettings | Mapping[str, Any] | None = None,
    ray: str | None = None,
    workers: int | None = None,
    **options: Unpack[TuneOptions],
) -> Sweep:
    """Find the settings of a soft prompt, and train it with them.

    Candidates are trained side by side. At the end of each rung the validation data decide which of them go on, one
    in ``eta``, with their prompts and optimizers as they are: the last one is what `tune` makes of its settings.
    Report its quality on a third data set, since the second one chose it.

    Args:
        base_model: See `tune`.
        train_data: See `tune`; a single data set.
        validation_data: What decides; or ``validation_split``.
        output: Directory to write the best prompt, ``sweep.json`` and ``sweep.png`` to.
        overwrite: Write into an output directory that is not empty.
        resume: Continue the sweep that was interrupted in ``output``, with its own settings.
        ray: Address of a Ray cluster whose workers train the candidates: ``local`` starts it on this machine,
            ``auto`` finds the one that runs; None trains them here. An interrupted sweep goes on either way.
        workers: Workers on Ray, by default one for each GPU, or without GPUs one for each machine.
        space: What is tried, such as ``{"learning_rates": ["x0.3", "x1"], "inits": ["RANDOM", "TEXT"]}``.
        **options: What all candidates share: the fields of `TuneSettings`.

    Raises:
        UsageError: There is no output, or nothing to resume.
        ConfigError: An unknown or contradictory setting, no validation data, or Optuna is not installed.
        ProcessLostError: A worker on Ray, or a process beside this one, has ended; the state is saved.
        TrainingInterrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    if output is None:
        raise UsageError("a sweep needs an output directory, for its state and for the best prompt")
    target, plan = Path(output), None
    if not resume:
        tried = space if isinstance(space, SweepSettings) else from_mapping(SweepSettings, space or {})
        plan = RunPlan(base_model, train_data, validation_data, TuneSettings.from_dict(options), plain(tried))
    cluster = nullcontext() if ray is None else connected(ray, workers)
    with joined() as ranks, claimed(target, overwrite=overwrite, resume=resume), cluster as reached:
        if plan is None:
            plan = resumed("sweep", base_model, train_data, validation_data, target, renamed(TuneSettings, options))
            if space:
                raise UsageError("the interrupted sweep tries what it was started with; leave that out to resume")
            tried = from_mapping(SweepSettings, plan.sweep or {})
        return _swept(plan, tried, target if ranks.is_main else None, (ray, reached, workers), resume=resume)


def _swept(
    plan: RunPlan, tried: SweepSettings, target: Path | None, ray: tuple[Any, Any, Any], *, resume: bool
) -> Sweep:
    """Run a plan; ``ray`` are address, cluster and workers."""
    clock = time.perf_counter()
    refuse_ignored(plan.settings)
    choices = grid_of(plan.settings, tried)
    address, cluster, workers = ray
    if address is not None and plan.settings.track:
        raise ConfigError("track would be ignored on Ray, whose workers train; leave it out")
    trackers = plan.trackers(target)
    data = plan.data()
    if len(data) > 1:
        raise ConfigError("a sweep takes one data set; sweep each task by itself")
    if not data[0].validation:
        raise ConfigError("a sweep needs validation data to decide by: give validation_data or validation_split")
    study = optuna_of(plan.settings, tried) if tried.driver == "optuna" else None
    with timed(silent=plan.settings.silence_progress_bars) as parts, unsaid():
        first = prepare(plan.base_model, data, choices[0].settings(plan.settings))
        summarize(first, [])
        require_alike(first)
        known = identity(first)
        snapshots, record = load_states(target if resume else None, known)
        with StopSignal() as stop, kept_if_resumable(target):
            if target is not None and not resume:
                plan.begin(target)
                known = {"command": "sweep", "base_model": plan.names()["base_model"]}
                settings = plan.settings.to_dict() | {"sweep": plan.sweep}
                plan_file = json.dumps({**SEAL, **known, "settings": settings}).encode()
                write_sealed(state_path(target).with_name(PLAN_FILE), plan_file)
            given = plan.base_model, data, choices[0].settings(plan.settings), plan.settings
            again = "" if address is None else f" --ray {shlex.quote(address)}"
            most = len(choices) if study is None else tried.eta  # that are trained at once
            with rungs_on_ray(cluster, workers, most, stop.check, *given) as elsewhere:
                halving = Halving(first, plan.settings, target, stop, snapshots, record, trackers, elsewhere, again)
                best, steps = _halved(halving, tried, choices, study)
            prepared, trained = halving.finished(best)
    ranked = sorted(halving.tried.values(), key=lambda each: each.standing, reverse=True)
    by = "accuracy" if "accuracy" in best.points[-1]["validation"] else "loss"
    trained.metrics["sweep"] = {"candidates": len(ranked), "rungs": steps, "by": f"validation {by}"}
    result = Sweep(tuned_of(prepared, trained.timed(parts, time.perf_counter() - clock)), ranked, steps, by)
    if target is not None:
        _write(result, target, plan, logged=address is None)
    finish_trackers(trackers, result.prompt, prepared.tasks)
    return result


def _write(result: Sweep, target: Path, plan: RunPlan, *, logged: bool) -> None:
    """Write the best prompt, what was tried, its figure and its log if it has a whole one; the state is removed."""
    write_output(result.prompt, target, plan.names(), TuneSettings.from_dict(result.prompt.whole.settings))
    write_atomically(target / SWEEP_FILE, json.dumps(result.to_dict(), indent=2) + "\n")
    with suppress(ConfigError):  # matplotlib is not installed
        (target / SWEEP_FIGURE).unlink(missing_ok=True)
        write_atomically(target / SWEEP_FIGURE, png_of(sweep_figure(result.to_dict())))
    (target / LOG_FILE).unlink(missing_ok=True)
    publish_logs(target, {result.candidates[0].name: target} if logged else {})


def _halved(
    halving: Halving, tried: SweepSettings, choices: list[Combination], study: Any
) -> tuple[Tried, list[int]]:
    """Train the candidates rung by rung, and return the best one and the steps of the rungs."""
    count = len(choices) if study is None else tried.candidates or TRIALS
    steps = steps_of_rungs(halving.total_steps, count, tried.eta, tried.rungs)
    titles = [f"rung {number} of {len(steps)}" for number in range(1, len(steps) + 1)]
    untils = [*steps[:-1], None]
    if study is None:
        group = [halving.add(choice) for choice in choices]
        halving.train(group, 0, untils[0], titles[0])
    else:
        group = []
        while len(group) < count:
            trials = [study.ask() for _ in range(min(tried.eta, count - len(group)))]
            part = [halving.add(suggested(trial, choices)) for trial in trials]
            halving.train(part, 0, untils[0], titles[0])
            group += part
            for trial, each in zip(trials, part, strict=True):
                study.tell(trial, quality_of(each.points[0]["validation"])[0] if each.points else -1e9)
    for rung in range(1, len(steps)):
        group = halving.keep(group, max(1, len(group) // tried.eta))
        logger.info("best so far: %s", _said(group[0]))
        halving.train(group, rung, untils[rung], titles[rung])
    (best,) = halving.keep(group, 1)
    logger.info("best: %s", _said(best))
    return best, steps


def _said(tried: Tried) -> str:
    rate = None if tried.learning_rate is None else f"{tried.learning_rate:.4g}"
    choice = {"init": tried.choice.init, "tokens": tried.choice.length, "learning rate": rate}
    named = ", ".join(f"{name} {value}" for name, value in choice.items() if value is not None)
    measured = ", ".join(f"{name} {value:.4f}" for name, value in tried.points[-1]["validation"].items())
    return f"{tried.choice.method}, {named}: validation {measured}"
