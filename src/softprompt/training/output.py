"""The output directory of a run: checked before any work, touched only when the prompt is finished.

While a run goes on, all it writes is in ``.state``; what was in the directory before stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from softprompt.artifacts import require_empty, require_no_file
from softprompt.errors import (
    ArtifactError,
    OutputExistsError,
    TrainingError,
    TrainingInterrupted,
    UsageError,
)
from softprompt.training.checkpoint import remove_state, state_path
from softprompt.training.interrupt import how_to_go_on


def check_output(output: Path | None, *, overwrite: bool) -> None:
    """Refuse an output directory that could not be written to in the end.

    Raises:
        UsageError: there is nothing to overwrite.
        OutputExistsError: it holds something that would be lost.
        ArtifactError: it may not be written to.
    """
    if output is None:
        if overwrite:
            raise UsageError("overwrite has no meaning without output; name an output directory")
        return
    _require_writable(output)
    if overwrite:
        require_no_file(output)
        return
    if state_path(output).exists():
        raise OutputExistsError(
            f"{output} holds an interrupted run; continue it with --resume (resume=True in "
            "Python), or start again with --overwrite (overwrite=True)"
        )
    # A run that was killed before its first state left nothing to continue.
    remove_state(output)
    require_empty(output)


def _require_writable(output: Path) -> None:
    place = next(path for path in (output, *output.absolute().parents) if path.exists())
    if place == output and not place.is_dir():
        return  # refused as a file, with another message
    if not place.is_dir():
        raise ArtifactError(
            f"expected an output directory, {output} lies in {place}: Not a directory; choose "
            "another path"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise ArtifactError(
            f"expected an output directory that can be written to, {place} is read-only for this "
            "user; choose another path, or change its permissions"
        )


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


def publish_logs(output: Path) -> None:
    """Move the finished run's logs out of its state, and remove the state."""
    for log in sorted(state_path(output).parent.glob("*.jsonl")):
        os.replace(log, output / log.name)
    remove_state(output)
