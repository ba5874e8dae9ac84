"""One run from its start, or from where it was interrupted, to its best prompt."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from softprompt.engine.rows import EngineRow
from softprompt.errors import TrainingError, TrainingInterrupted
from softprompt.training.checkpoint import load_state, remove_state, save_state
from softprompt.training.events import LOG_FILE, Events
from softprompt.training.interrupt import StopSignal
from softprompt.training.loop import Job, train
from softprompt.training.optimisation import build_optimizer
from softprompt.training.preparation import Prepared
from softprompt.training.state import RunState
from softprompt.training.validation import Validation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trained:
    """What training came to; the prompt itself is in the model."""

    metrics: dict[str, Any]
    history: list[dict[str, Any]]


def run(prepared: Prepared, output: Path | None, *, resume: bool) -> Trained:
    """Train the prompt in place and leave the best one in it.

    Raises:
        TrainingInterrupted: with the command that continues, when there is an ``output``.
        TrainingError: the loss is not finite, or the saved state is not of this run.
    """
    stop = StopSignal()
    job = _job(prepared, stop.check)
    optimizer = build_optimizer(prepared.settings, prepared.prompt, prepared.learning_rate)
    identity = _identity(prepared)
    state = RunState()
    if resume and output is not None:
        state = load_state(output, prepared.prompt, optimizer, identity)

    def save() -> None:
        if output is not None:
            save_state(output, state, prepared.prompt, optimizer, identity)

    save()
    silent = prepared.settings.silence_progress_bars
    try:
        with stop, Events(output, state, job.total_updates(), silent=silent) as events:
            train(job, state, optimizer, events, check_stop=stop.check, save=save)
    except TrainingInterrupted:
        save()
        raise TrainingInterrupted(_how_to_go_on(state, output)) from None
    except TrainingError:
        if output is not None:
            _remove_traces(output)
        raise
    return _best(prepared, state)


def _job(prepared: Prepared, check_stop: Callable[[], None]) -> Job:
    settings = prepared.settings
    validation = None
    if prepared.validation:
        validation = Validation(
            prepared.engine,
            prepared.validation,
            prepared.labels,
            settings.batch_size * 4,
            check_stop,
        )
    return Job(
        engine=prepared.engine,
        model=prepared.base.model,
        prompt=prepared.prompt,
        rows=[EngineRow(row.source, row.target) for row in prepared.train],
        settings=settings,
        learning_rate=prepared.learning_rate,
        embedding_rms=prepared.facts.embedding_rms,
        validation=validation,
    )


def _identity(prepared: Prepared) -> dict[str, Any]:
    """Return what must be the same for a state to be continued."""
    hashes = {name: found["sha256"] for name, found in prepared.data.fingerprints.items()}
    return {
        "base model fingerprint": prepared.fingerprint.short,
        **{f"{name} data sha256": digest for name, digest in hashes.items()},
    }


def _best(prepared: Prepared, state: RunState) -> Trained:
    """Put the prompt to keep into the model and sum the run up."""
    kept = state.epoch
    if prepared.settings.keep_best and state.best_prompt is not None:
        kept = state.best_epoch
        with torch.no_grad():
            prepared.prompt.copy_(state.best_prompt)
    point = state.history[kept - 1]
    metrics: dict[str, Any] = {
        "loss": state.history[-1]["loss"],
        "epoch": kept,
        "epochs": state.epoch,
        "updates": state.update,
        "learning_rate": prepared.learning_rate,
        "tokens_per_second": round(state.tokens_per_second, 1),
        "seconds": round(state.seconds, 2),
    }
    if "validation" in point:
        metrics["validation"] = point["validation"]
    return Trained(metrics, state.history)


def _how_to_go_on(state: RunState, output: Path | None) -> str:
    where = f"training was stopped after update {state.update} (epoch {state.epoch + 1})"
    if output is None:
        return f"{where}; nothing is saved, since the run has no output directory"
    command = f"softprompt tune --resume --output {shlex.quote(str(output))}"
    return f"{where}; its state is saved, continue with: {command}"


def _remove_traces(output: Path) -> None:
    """Leave nothing of a failed run, so that it can be started again with other settings."""
    remove_state(output)
    (output / LOG_FILE).unlink(missing_ok=True)
    if output.is_dir() and not any(output.iterdir()):
        shutil.rmtree(output)
