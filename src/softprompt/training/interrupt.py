"""Ctrl-C and SIGTERM as a flag that the loop checks, and what an interrupted run leaves to be resumed."""

from __future__ import annotations

import logging
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from softprompt.errors import TrainingError, TrainingInterrupted
from softprompt.training.state import remove_state, state_path

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


@contextmanager
def kept_if_resumable(output: Path | None) -> Iterator[None]:
    """Leave nothing of a run that ends inside without a state it could be continued from.

    One whose numbers are not finite would fail again, so its state goes too.

    Raises:
        TrainingInterrupted: a second Ctrl-C came, and the state of the last epoch is there.
    """
    try:
        yield
    except TrainingInterrupted:
        raise
    except BaseException as error:
        if output is None:
            raise
        failed = isinstance(error, TrainingError)
        if state_path(output).exists() and not failed:
            if isinstance(error, KeyboardInterrupt):
                raise TrainingInterrupted(how_to_go_on("at once", output)) from None
            raise
        remove_state(output)
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()
        raise
