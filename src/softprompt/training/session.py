"""One run from its start, or from where it was interrupted, to its best prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt.errors import TrainingInterrupted
from softprompt.training.checkpoint import Snapshot, save_state, state_path
from softprompt.training.events import Events
from softprompt.training.interrupt import StopSignal, how_to_go_on
from softprompt.training.job import Job
from softprompt.training.loop import train
from softprompt.training.optimisation import build_optimizer
from softprompt.training.preparation import Prepared
from softprompt.training.stages import Stage, stages_of
from softprompt.training.state import RunState


@dataclass(frozen=True, slots=True)
class Trained:
    """What training came to; the prompt itself is in the model."""

    metrics: dict[str, Any]
    history: list[dict[str, Any]]


def run(
    prepared: Prepared, output: Path | None, stop: StopSignal, found: Snapshot | None = None
) -> Trained:
    """Train the prompt in place and leave the best one in it.

    Args:
        prepared: What is trained on what.
        output: Where the state is kept; None keeps none.
        stop: Asked before each batch.
        found: The state of the run to be continued.

    Raises:
        TrainingInterrupted: with the command that continues, when there is an ``output``.
        TrainingError: the loss is not finite.
    """
    session = _Session(prepared, output, stop, identity(prepared))
    if found is not None:
        session.earlier = dict(found.tensors["earlier"])
        session.results = dict(found.results)
    trained = Trained({}, [])
    for stage in stages_of(prepared, session.earlier, stop.check):
        if stage.name in session.results:
            continue
        trained = session.run(stage, found)
        found = None
        session.results[stage.name] = trained.metrics
        if stage.leaves:
            session.earlier = dict(stage.job.prompt.state_dict())
    earlier = dict(list(session.results.items())[:-1])
    return Trained(trained.metrics | earlier, trained.history)


@dataclass
class _Session:
    """What the stages of a run share.

    ``earlier`` holds the parameters that finished stages left, ``results`` what they came to.
    """

    prepared: Prepared
    output: Path | None
    stop: StopSignal
    identity: Mapping[str, Any]
    earlier: dict[str, Tensor] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    def run(self, stage: Stage, found: Snapshot | None) -> Trained:
        """Train one stage, from its snapshot when it was interrupted."""
        job = stage.job
        optimizer = build_optimizer(job.settings, job.prompt, self.prepared.rates)
        state = RunState()
        if found is not None:
            found.restore(job.prompt, optimizer)
            state = found.run

        def save() -> None:
            if self.output is None:
                return
            snapshot = Snapshot.of(
                stage.name,
                state,
                job.prompt,
                optimizer,
                earlier=self.earlier,
                results=self.results,
            )
            save_state(self.output, snapshot, self.identity)

        save()
        silent = job.settings.silence_progress_bars
        log = None if self.output is None else state_path(self.output).with_name(stage.log_file)
        try:
            total = job.total_updates()
            with Events(log, state, total, silent=silent, of=stage.of) as events:
                train(job, state, optimizer, events, check_stop=self.stop.check, save=save)
        except TrainingInterrupted:
            save()
            where = f"update {state.update} (epoch {state.epoch + 1}{stage.of})"
            raise TrainingInterrupted(how_to_go_on(f"after {where}", self.output)) from None
        return _best(job, state)


def identity(prepared: Prepared) -> dict[str, Any]:
    """Return what must be the same for a state to be continued."""
    hashes = {
        " ".join(filter(None, (task.data.name, split))): found["sha256"]
        for task in prepared.tasks
        for split, found in task.data.fingerprints.items()
    }
    return {
        "base model fingerprint": prepared.fingerprint.short,
        **{f"{name} data sha256": digest for name, digest in hashes.items()},
    }


def _best(job: Job, state: RunState) -> Trained:
    """Put the prompt to keep into its module and sum the stage up."""
    kept = state.epoch
    if job.settings.keep_best and state.best is not None:
        kept = state.best_epoch
        job.prompt.load_state_dict(state.best)
    point = state.history[kept - 1]
    metrics: dict[str, Any] = {
        "loss": state.history[-1]["loss"],
        "epoch": kept,
        "epochs": state.epoch,
        "updates": state.update,
        "learning_rate": job.learning_rate,
        "tokens_per_second": round(state.tokens_per_second, 1),
        "seconds": round(state.seconds, 2),
    }
    if "validation" in point:
        metrics["validation"] = point["validation"]
    return Trained(metrics, state.history)
