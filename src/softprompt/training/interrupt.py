"""Ctrl-C and SIGTERM as a question the loop asks, not an exception in the middle of a step."""

from __future__ import annotations

import logging
import shlex
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from softprompt.errors import TrainingInterrupted

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """While entered, notes the first Ctrl-C or SIGTERM; a second one acts at once.

    Signals can only be caught in the main thread; elsewhere `request` does the same.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Take over the signals."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the signals back."""
        self._restore()

    def request(self) -> None:
        """Ask the loop to stop before its next batch."""
        self.requested = True

    def check(self) -> None:
        """Stop here if that was asked for.

        Raises:
            TrainingInterrupted: a signal came, or `request` was called.
        """
        if self.requested:
            raise TrainingInterrupted("training was stopped")

    def _note(self, number: int, frame: FrameType | None) -> None:
        logger.info("stopping after this batch; a second Ctrl-C stops at once")
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def how_to_go_on(where: str, output: Path | None) -> str:
    """Return the sentence that ends an interrupted run: where it stopped, and what continues it."""
    if output is None:
        return (
            f"training was stopped {where}; nothing is saved, since the run has no output directory"
        )
    command = f"softprompt tune --resume --output {shlex.quote(str(output))}"
    return f"training was stopped {where}; its state is saved, continue with: {command}"
