"""Trackers of experiments: what a run sends to TensorBoard, MLflow, Weights & Biases or Trackio.

All through accelerate's tracker interface (``accelerate.tracking``), one tracker run for a command. The numbers of
prompts that are trained side by side, and of teachers, have a name in front: ``seed-74/train/loss``.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from softprompt.errors import ConfigError, SoftPromptError
from softprompt.fields import flat
from softprompt.generation import GenerationOptions
from softprompt.training.output import state_path

if TYPE_CHECKING:
    from softprompt.inference import TunedPrompt
    from softprompt.training.preparation import TaskRows

logger = logging.getLogger(__name__)

FOLDER = "tensorboard"
"""Where TensorBoard's files are, in an output directory."""

_FILE = "trackers.json"
_PROJECT = "softprompt"
_OWN_STEPS = ("wandb", "trackio")
"""Trackers whose steps may only grow, whatever is trained after another: they get the update as a number."""
_SAMPLES, _MOST = 3, 64
"""Answers that are sent, and their tokens at most."""


def trackers_of(names: Sequence[str], output: Path | None, known: Mapping[str, Any]) -> list[Tracking]:
    """Return the callback that sends a run to trackers, none where there are none.

    All processes of a run have it, since they ask the same callbacks what they wish; the first one calls it.

    Args:
        names: The trackers.
        output: The output directory; what continues a tracker's run lies in its state.
        known: What the run is made of, for the trackers' settings.

    Raises:
        ConfigError: A tracker's package is not installed.
    """
    if not names:
        return []
    for package in ("accelerate", *names):
        if find_spec(package) is None:
            raise ConfigError(
                f"track takes trackers that are installed; got {', '.join(names)} without the package {package}: "
                f"pip install {package}, or leave track out"
            )
    return [Tracking(names, output, known)]


def finish_trackers(trackers: Sequence[Tracking], tuned: TunedPrompt, tasks: Sequence[TaskRows]) -> None:
    """Send a few answers of the finished prompt and where it is written, and close the trackers' runs."""
    for each in trackers:
        each.finish(tuned, tasks)


@final
class Tracking:
    """A callback that sends settings, losses, rates, validations, samples and the artifact's path to trackers.

    A resumed run goes on with the same run of each tracker. Updates that were told before a kill, and are made
    again, are not told again: they are the same. A tracker that fails in the middle is left, and the run goes on.
    """

    def __init__(self, names: Sequence[str], output: Path | None, known: Mapping[str, Any]) -> None:
        self._names, self._output, self._known = names, output, known
        self._open: list[Any] | None = None
        self._file = None if output is None else state_path(output).with_name(_FILE)
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        self._record: dict[str, Any] = {
            "run": f"{output.name}-{stamp}" if output else stamp,
            "mlflow": None,
            "told": {},
        }

    def on_train_begin(self, *run: Any, **others: Any) -> None:
        """Begin the trackers' runs, or go on with them."""
        if self._open is not None:
            return
        found = _read(self._file)
        self._record |= found
        self._open = []
        for name in self._names:
            try:
                self._open.append(self._started(name, known={} if found else self._known))
            except Exception as error:
                self.close()
                raise ConfigError(f"track {name} could not begin: {_line(error)}") from error
        self._remember()

    def on_log(
        self,
        settings: Any,
        state: Any,
        control: Any,
        *,
        logs: Mapping[str, Any],
        stage: str,
        run: str,
        **others: Any,
    ) -> None:
        """Send the loss and rate of an update, or what was validated after an epoch."""
        validated = {name.removeprefix("eval_"): each for name, each in logs.items() if name.startswith("eval_")}
        teachers = "" if stage == "prompt" else stage
        place = "/".join(filter(None, (run, teachers, "validation" if validated else "train")))
        if state.global_step <= self._record["told"].get(place, 0):
            return
        values = validated or {name: logs[name] for name in ("loss", "learning_rate")}
        # MLflow takes no other characters in a name, which may be that of a task.
        named = {re.sub(r"[^\w\-. /]", "_", f"{place}/{name}"): float(each) for name, each in values.items()}
        self._each(lambda tracker: _log(tracker, named, state.global_step))
        self._record["told"][place] = state.global_step
        self._remember()

    def on_interrupted(self, *run: Any, **others: Any) -> None:
        """Close the trackers' runs; a resumed run opens them again."""
        self.close()

    def finish(self, tuned: TunedPrompt, tasks: Sequence[TaskRows]) -> None:
        """Send a few answers of the finished prompt and where it is written, and close the trackers' runs."""
        if self._open is None:  # as in all processes but the first
            return
        # Every process of a sharded base would have to run what the first one runs here.
        texts = {} if tuned.base.shard else {"samples": _samples(tuned, tasks)}
        if self._output is not None:
            texts["artifact"] = str(self._output.absolute())
        if "end" not in self._record["told"]:
            self._each(lambda tracker: _tell(tracker, texts))
            self._record["told"]["end"] = 1
        self.close()

    def close(self) -> None:
        """Close the trackers' runs."""
        if self._open is not None:
            self._remember()
            self._each(lambda tracker: tracker.finish())
        self._open = None

    def _started(self, name: str, known: Mapping[str, Any]) -> Any:
        tracking, run = import_module("accelerate.tracking"), self._record["run"]
        tracking.PartialState()  # the trackers' logger refuses to write before there is one
        if name == "tensorboard":
            folder = self._output / FOLDER if self._output else os.environ.get("TENSORBOARD_LOGGING_DIR", FOLDER)
            tracker = tracking.TensorBoardTracker(run, logging_dir=folder)
        elif name == "mlflow":
            nested = import_module("mlflow").active_run() is not None
            run_id = self._record["mlflow"]
            tracker = tracking.MLflowTracker(_PROJECT, run_id=run_id, run_name=run, nested_run=nested)
        elif name == "wandb":
            project = os.environ.get("WANDB_PROJECT", _PROJECT)
            tracker = tracking.WandBTracker(project, name=run, id=run, resume="allow")
        else:
            tracker = tracking.TrackioTracker(_PROJECT, name=run, resume="allow")
        tracker.start()
        if name == "mlflow":
            self._record["mlflow"] = tracker.tracker.info.run_id
        if known:
            pairs = [(name, value) for name, value in flat(known, "/").items() if value is not None]
            plain = {n: v if isinstance(v, bool | int | float | str) else json.dumps(v) for n, v in pairs}
            tracker.store_init_configuration(plain)
        return tracker

    def _each(self, call: Callable[[Any], None]) -> None:
        """Call each tracker; one that fails is told of and left."""
        for tracker in list(self._open or ()):
            try:
                call(tracker)
            except Exception as error:
                logger.warning("%s is told nothing further: %s", tracker.name, _line(error))
                if self._open is not None:
                    self._open.remove(tracker)

    def _remember(self) -> None:
        """Keep what continues the trackers' runs; not synced, for it is written with every update."""
        if self._file is not None and self._file.parent.exists():
            beside = self._file.with_suffix(".partial")
            beside.write_text(json.dumps(self._record), encoding="utf-8")
            os.replace(beside, self._file)


def _log(tracker: Any, values: dict[str, float], step: int) -> None:
    if tracker.name in _OWN_STEPS:
        tracker.log({**values, "update": step})
    else:
        tracker.log(values, step=step)


def _tell(tracker: Any, texts: Mapping[str, str]) -> None:
    if tracker.name != "mlflow":
        tracker.log(dict(texts))
        return
    mlflow = import_module("mlflow")  # its metrics are numbers
    if "samples" in texts:
        mlflow.log_text(texts["samples"], "samples.md")
    if "artifact" in texts:
        mlflow.set_tag("artifact", texts["artifact"])


def _samples(tuned: TunedPrompt, tasks: Sequence[TaskRows]) -> str:
    """Return what the prompt answers to the first records that it was validated on, or else trained on."""
    parts = []
    for task in tasks:
        rows, tokenizer = (task.validation or task.train)[:_SAMPLES], task.tokenizer.tokenizer
        longest = max(len(row.target) for row in task.train)
        own, options = tuned.of_task(task.data.name or None), GenerationOptions(max_new_tokens=min(longest, _MOST))
        try:
            answers = [each.text for each in own.generate_rows([row.source for row in rows], options)]
        except SoftPromptError as error:  # as where such an answer does not fit into the context
            answers = [f"({error})"] * len(rows)
        for row, answer in zip(rows, answers, strict=True):
            target = tokenizer.decode(list(row.target), skip_special_tokens=True)
            parts.append(f"    {tokenizer.decode(list(row.source))}\n\nanswer: `{answer}`, target: `{target}`")
    return "\n\n".join(parts)


def _read(file: Path | None) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file is not None else {}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
