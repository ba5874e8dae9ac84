"""The lock of a folder that a run is at work in, ``.state/lock``; one that no process holds means nothing."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from softprompt.errors import OutputExistsError

try:
    import fcntl
except ImportError:  # Windows has none, and no lock is held there
    fcntl = None  # type: ignore[assignment]

STATE_DIRECTORY = ".state"
"""What a run keeps in its output while it is at work, or after it was interrupted."""
LOCK_FILE = "lock"
_OWN: list[tuple[int, int] | None] = []
"""Device and inode of the locks that this process holds."""


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock of a folder, made if needed.

    Raises:
        OutputExistsError: A run is at work there.
    """
    path = output / STATE_DIRECTORY / LOCK_FILE
    while True:
        with _opened(path) as file:
            _lock(file, output)
            if (own := _identity(file.fileno())) != _identity(path):
                continue  # the run that held it removed it just now
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            _OWN.append(own)
            try:
                yield
            finally:
                _OWN.remove(own)
            return


def refuse_running(output: Path, *, but_own: bool = False) -> None:
    """Raise ``OutputExistsError`` where a run is at work, ``but_own``: one of another process."""
    with suppress(OSError), (output / STATE_DIRECTORY / LOCK_FILE).open("r+", encoding="utf-8") as file:
        if not (but_own and _identity(file.fileno()) in _OWN):
            _lock(file, output)


def _opened(path: Path) -> TextIO:
    """Open the file of a lock; a run that ends may remove its folder meanwhile."""
    with suppress(FileNotFoundError, FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+", encoding="utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a+", encoding="utf-8")


def _identity(file: Path | int) -> tuple[int, int] | None:
    """Return device and inode of a file; None where there is none."""
    with suppress(FileNotFoundError):
        return (found := os.stat(file)).st_dev, found.st_ino
    return None


def _lock(file: TextIO, output: Path) -> None:
    """Lock a file until it is closed; without a word where the file system has no locks."""
    for left in (2, 1, 0):
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if left:
                time.sleep(0.05)  # somebody may only be looking
        except OSError:
            return
    file.seek(0)
    raise OutputExistsError(
        f"another run is at work in {output} ({file.read(200) or 'it just began'}); wait for its end, or choose "
        "another output directory"
    )
