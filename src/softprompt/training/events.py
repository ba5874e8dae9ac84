"""What a run tells while it runs: a log file in caikit's format, a progress bar, log lines."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

from softprompt.artifacts import write_atomically
from softprompt.training.state import RunState

logger = logging.getLogger(__name__)

LOG_FILE = "training_logs.jsonl"


class Events:
    """Progress of one stage of a run. Without a log file none is written.

    Lines of the log file: ``{"name": "loss", "data": {"epoch", "step", "value", "timestamp"}}``,
    one per update; epochs count from 0, steps (updates) from 1 through the whole run, the value
    is the mean loss per target token, in nats.
    """

    def __init__(self, log: Path | None, state: RunState, total: int, *, silent: bool, of: str = "") -> None:
        """Open the log file ``log`` behind what it holds of this run; ``of`` names the stage."""
        self._of = of
        self._log = _open_log(log, state.update) if log else None
        self._bar = tqdm(
            total=total,
            initial=state.update,
            unit="update",
            file=sys.stderr,
            disable=silent or not sys.stderr.isatty(),
        )

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the bar and the log file."""
        self._bar.close()
        if self._log is not None:
            self._log.close()

    def update(self, state: RunState, loss: float) -> None:
        """Tell of a finished update."""
        self._bar.update()
        self._bar.set_postfix_str(
            f"epoch {state.epoch + 1}{self._of}, loss {state.mean_loss:.4f}, "
            f"{state.tokens_per_second:,.0f} tokens/s",
            refresh=False,
        )
        if self._log is not None:
            data = {
                "epoch": state.epoch,
                "step": state.update,
                "value": loss,
                "timestamp": datetime.now(UTC).isoformat(),
            }
            self._log.write(json.dumps({"name": "loss", "data": data}) + "\n")
            self._log.flush()

    def epoch(self, point: dict[str, Any]) -> None:
        """Tell of a finished epoch."""
        measured = {"loss": point["loss"]}
        measured |= {f"validation {k}": v for k, v in point.get("validation", {}).items()}
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
        with self._bar.external_write_mode(file=sys.stderr):
            logger.info("epoch %d%s: %s", point["epoch"], self._of, numbers)


def _open_log(path: Path, updates: int) -> TextIO:
    """Open the log behind the lines of the first ``updates`` updates.

    Lines past them belong to work that was lost when an earlier run died and is done again now.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() and updates else []
    kept = [line for line in lines if _step_of(line) <= updates]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(line + "\n" for line in kept))
    return path.open("a", encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["data"]["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
