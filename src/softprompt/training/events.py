"""What a run tells while it runs: a log file in caikit's format, a progress bar, log lines, callbacks."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO, final

from softprompt.artifacts import write_atomically
from softprompt.errors import ConfigError
from softprompt.progress import progress_bar
from softprompt.world import world

if TYPE_CHECKING:
    from softprompt.training.settings import TuneSettings
    from softprompt.training.state import RunState

logger = logging.getLogger(__name__)

LOG_FILE = "training_logs.jsonl"


CALLS = (
    "train_begin",
    "epoch_begin",
    "step_begin",
    "step_end",
    "log",
    "evaluate",
    "epoch_end",
    "train_end",
    "interrupted",
)
"""The events that callbacks get, as transformers' Trainer names them behind ``on_``, and ours, the last one."""


def checked_callbacks(callbacks: Sequence[object]) -> list[object]:
    """Return callbacks, classes among them as objects.

    Raises:
        ConfigError: One of them has no method that would be called.
    """
    for each in callbacks:
        if not any(hasattr(each, f"on_{event}") for event in CALLS):
            raise ConfigError(
                "callbacks takes objects with methods such as on_log and on_step_end, as transformers' "
                f"TrainerCallback has; got {each!r}"
            )
    return [each() if isinstance(each, type) else each for each in callbacks]


@final
class Callbacks:
    """The callbacks of a stage, each called as transformers' Trainer calls a ``TrainerCallback``.

    A method gets the run's `TuneSettings`, a ``TrainerState`` and a ``TrainerControl``, and by name what ``others``
    holds. ``control.should_training_stop`` ends the run with this update, ``should_epoch_stop`` the epoch. Of
    several processes the first one calls, and all do what it wishes.
    """

    def __init__(
        self, called: Sequence[object] = (), settings: TuneSettings | None = None, total: int = 0, **others: Any
    ) -> None:
        self._called, self._settings, self._others = called, settings, others
        self._state: Any = None
        self._control: Any = None
        if called and settings is not None:
            from transformers import TrainerControl, TrainerState

            self._control = TrainerControl()
            self._state = TrainerState(max_steps=total, num_train_epochs=settings.num_epochs, logging_steps=1)

    def wants(self, wish: str) -> bool:
        """Return whether a callback set a wish, such as ``should_training_stop``."""
        if not self._called:
            return False
        return world().from_main(lambda: bool(getattr(self._control, wish, False)))

    def call(self, event: str, run: RunState, **values: Any) -> None:
        """Call the method of an event; ``values`` are further arguments by name."""
        if self._state is None or not world().is_main:
            return
        if event == "epoch_begin":
            self._control.should_epoch_stop = False
        self._state.global_step = run.update
        self._state.epoch = run.update / self._state.max_steps * self._state.num_train_epochs
        if "logs" in values:
            values["logs"] = values["logs"] | {"epoch": self._state.epoch}
            self._state.log_history.append(values["logs"] | {"step": run.update})
        for each in self._called:
            method = getattr(each, f"on_{event}", None)
            if method is not None:
                answer = method(self._settings, self._state, self._control, **self._others, **values)
                self._control = answer or self._control


@final
class Events:
    """Progress of one stage of a run: a log file, a progress bar, log lines, and calls of callbacks.

    Lines of the log file: ``{"name": "loss", "data": {"epoch", "step", "value", "timestamp"}}``,
    one per update; epochs count from 0, steps (updates) from 1 through the whole run, the value
    is the mean loss per target token, in nats.
    """

    def __init__(
        self,
        log: Path | None,
        state: RunState,
        total: int,
        *,
        silent: bool,
        of: str = "",
        callbacks: Callbacks | None = None,
        level: int = logging.INFO,
    ) -> None:
        """Open the log file ``log`` behind what it holds of this run, None for no file.

        ``of`` names the stage, ``level`` is that of a line for each epoch.
        """
        self._of, self._state, self._callbacks, self._level = of, state, callbacks or Callbacks(), level
        self._log = _open_log(log, state.update) if log else None
        self._bar: Any = None
        self._shown = progress_bar(total, "update", done=state.update, silent=silent)

    def __enter__(self) -> Self:
        """Begin, and show the bar."""
        self._bar = self._shown.__enter__()
        self._callbacks.call("train_begin", self._state)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the bar and the log file."""
        self._shown.__exit__(None, None, None)
        if self._log is not None:
            self._log.close()
        self._callbacks.call("train_end" if kind is None else "interrupted", self._state)

    @property
    def stopped(self) -> bool:
        """Whether a callback asked for the end of the run."""
        return self._callbacks.wants("should_training_stop")

    @property
    def epoch_stopped(self) -> bool:
        """Whether a callback asked for the end of the epoch, or of the run."""
        return self.stopped or self._callbacks.wants("should_epoch_stop")

    def begin(self, what: str) -> None:
        """Tell that an ``epoch`` or a ``step`` (an update) begins."""
        self._callbacks.call(f"{what}_begin", self._state)

    def update(self, state: RunState, loss: float) -> None:
        """Tell of a finished update."""
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"epoch {state.epoch + 1}{self._of}, loss {state.mean_loss:.4f}, "
                f"{state.tokens_per_second:,.0f} tokens/s",
                refresh=False,
            )
            self._bar.update()
        if self._log is not None:
            data = {
                "epoch": state.epoch,
                "step": state.update,
                "value": loss,
                "timestamp": datetime.now(UTC).isoformat(),
            }
            self._log.write(json.dumps({"name": "loss", "data": data}) + "\n")
            self._log.flush()
        self._callbacks.call("step_end", state)
        self._callbacks.call("log", state, logs={"loss": loss, "learning_rate": state.learning_rate})

    def epoch(self, point: dict[str, Any]) -> None:
        """Tell of a finished epoch."""
        validation = point.get("validation", {})
        measured = {"loss": point["loss"]} | {f"validation {name}": v for name, v in validation.items()}
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
        logger.log(self._level, "epoch %d%s: %s", point["epoch"], self._of, numbers)
        if validation:
            metrics = {f"eval_{name}": value for name, value in validation.items()}
            self._callbacks.call("log", self._state, logs=metrics)
            self._callbacks.call("evaluate", self._state, metrics=metrics)
        self._callbacks.call("epoch_end", self._state)


def _open_log(path: Path, updates: int) -> TextIO:
    """Open the log behind the lines of the first ``updates`` updates.

    Lines past them belong to work that was lost when an earlier run died and is done again now; so may a torn one.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = text.split("\n") if updates else []
    kept = [line for line in lines if _step_of(line) <= updates]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(line + "\n" for line in kept))
    return path.open("a", encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["data"]["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")
