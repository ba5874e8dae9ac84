"""The one folder that prompts come from: names, real paths, and files read once.

A name is all that a client gives. It must look like one, and what it leads to must really lie under
the root: a link is followed only while it stays inside. Each file is opened once, and what is checked
is what was read, so a file that is replaced meanwhile is either the old one or the new one.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from softprompt.artifacts import MANIFEST_NAME, WEIGHTS_NAME
from softprompt.errors import AdapterError, ArtifactError, NotServingError, UsageError, excerpt
from softprompt.prompts import CONFIG_NAME

FILES = (CONFIG_NAME, WEIGHTS_NAME, MANIFEST_NAME)
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")

Signature = tuple[tuple[int, int, int, int] | None, ...]
"""Inode, size and the times of each of ``FILES``; None for one that is not there."""
FRESH_SECONDS = 0.02
"""The clock of file times may stand still for half of this, and a write leave no trace in them."""


def is_name(name: str) -> bool:
    """Tell whether a prompt may be called so; hidden folders are not prompts."""
    return _NAME.fullmatch(name) is not None and not name.startswith(".")


def is_fresh(signature: Signature) -> bool:
    """Tell whether files were written so lately that another write might look the same."""
    stamps = [max(stamp[2:]) for stamp in signature if stamp is not None]
    return any(0 <= time.time_ns() - stamp < FRESH_SECONDS * 1e9 for stamp in stamps)


@dataclass(frozen=True, slots=True)
class Root:
    """The folder of prompts, by its real path."""

    path: Path

    @classmethod
    def of(cls, directory: str | Path) -> Root:
        """Find the folder.

        Raises:
            UsageError: There is none.
        """
        path = Path(directory)
        if not path.is_dir():
            came = "is a file" if path.exists() else "does not exist"
            raise UsageError(
                f"expected a folder with one folder for each prompt, {directory} {came}; pass --prompts DIR"
            )
        return cls(path.resolve())

    def names(self) -> list[str]:
        """Return the names of folders that hold a prompt, in order.

        Raises:
            NotServingError: The root is gone.
        """
        return sorted(name for name in self.entries() if self._holds_prompt(name))

    def check(self) -> None:
        """Check that the folder can be read.

        Raises:
            NotServingError: It is gone.
        """
        self.entries()

    def entries(self) -> list[str]:
        """Return the names of all that may be prompts, with no look at what they are.

        Raises:
            NotServingError: The root is gone.
        """
        try:
            with os.scandir(self.path) as entries:
                return [entry.name for entry in entries if is_name(entry.name)]
        except OSError as error:
            raise NotServingError(
                f"the folder of prompts cannot be read ({error.strerror}); mount it again"
            ) from error

    def signature(self, name: str) -> Signature:
        """Return what changes when a prompt's files do; reads no content.

        Raises:
            AdapterError: There is no such prompt.
            NotServingError: The root is gone.
        """
        directory = self._directory(name)
        return tuple(_stamp(directory / file) for file in FILES)

    def read(self, name: str, file: str, most: int) -> bytes | None:
        """Return a file of a prompt, None when it has none.

        Args:
            name: The prompt.
            file: One of ``FILES``.
            most: Bytes it may have.

        Raises:
            AdapterError: There is no such prompt.
            ArtifactError: The file is a link out of the root, too large, or cannot be read.
        """
        path = self._directory(name) / file
        if not os.path.lexists(path):
            return None
        real = path.resolve()
        if not real.is_relative_to(self.path):
            raise ArtifactError(
                f"{name}/{file} is a link that leads out of the folder of prompts; copy the file there"
            )
        try:
            # NOFOLLOW: a link put there after the look above is refused; NONBLOCK: so is waiting on a pipe.
            handle = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(handle, "rb") as stream:
                data = stream.read(most + 1)
        except OSError as error:
            raise ArtifactError(
                f"{name}/{file} cannot be read ({error.strerror}); check the file and its permissions"
            ) from error
        if len(data) > most:
            raise ArtifactError(
                f"{name}/{file} is larger than {most:,} bytes; raise --max-prompt-bytes if it should be"
            )
        return data

    def _directory(self, name: str) -> Path:
        path = self.path / name
        # A folder that only looks absent to us (a link out) is as absent to clients.
        if not is_name(name) or not path.is_dir() or not path.resolve().is_relative_to(self.path):
            if not self.path.is_dir():
                self.check()
            raise AdapterError(f"there is no prompt {excerpt(name)!r}; GET /v1/models lists them")
        return path

    def _holds_prompt(self, name: str) -> bool:
        try:
            return (self._directory(name) / CONFIG_NAME).is_file()
        except (AdapterError, OSError):
            return False


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
