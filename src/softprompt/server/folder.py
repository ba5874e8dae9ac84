"""The folder of prompts on disk: names, real paths, file signatures, and an outline of each prompt.

Clients give names only. A name must match a pattern, and the path it leads to must lie under the
root after symbolic links are resolved. Each file is opened once and its content checked after
reading, so a file that is replaced meanwhile is either the old version or the new one.
"""

from __future__ import annotations

import math
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.artifacts import (
    MANIFEST_NAME,
    MOST_TEXT_BYTES,
    WEIGHTS_NAME,
    Manifest,
    check_config,
    manifest_of_task,
    parse_object,
)
from softprompt.errors import (
    AdapterError,
    ArtifactError,
    NotServingError,
    SoftPromptError,
    UsageError,
    excerpt,
    in_options,
    no_folder,
    without_folders,
)
from softprompt.prompts import CONFIG_NAME, PeftType, TaskType

FILES = (CONFIG_NAME, WEIGHTS_NAME, MANIFEST_NAME)
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")

Signature = tuple[tuple[int, int, int, int] | None, ...]
"""Inode, size, mtime and ctime in ns of each of ``FILES``; None for a missing one."""
FRESH_SECONDS = 0.02
"""Twice the resolution of file times: within it a second write may leave the times unchanged."""


def is_name(name: str) -> bool:
    """Whether a name is legal for a prompt; hidden folders are no prompts."""
    return _NAME.fullmatch(name) is not None and not name.startswith(".")


def is_fresh(signature: Signature) -> bool:
    """Whether files were written so recently that another write might keep their times."""
    stamps = [max(stamp[2:]) for stamp in signature if stamp is not None]
    return any(0 <= time.time_ns() - stamp < FRESH_SECONDS * 1e9 for stamp in stamps)


_RENAMED = "-prompt"
"""What is put behind a prompt's name where the base has that name."""


@dataclass(frozen=True, slots=True)
class PromptFolder:
    """The folder of prompts.

    Attributes:
        path: Its real path, symbolic links resolved.
        taken: Names of the base: a prompt in a folder of such a name is served under another.
    """

    path: Path
    taken: frozenset[str] = frozenset()

    @classmethod
    def of(cls, directory: str | Path) -> PromptFolder:
        """Resolve a folder; raises UsageError if it does not exist or is no folder."""
        path = Path(directory)
        if not path.is_dir():
            found = no_folder(directory) or f"{directory} {'is a file' if path.exists() else 'does not exist'}"
            raise UsageError(f"expected a folder with one folder for each prompt, {found}; pass --prompts DIR")
        return cls(path.resolve())

    def names(self) -> list[str]:
        """Return the names of subfolders that hold a prompt, sorted; raises NotServingError as ``entries``."""
        return sorted(name for name in self.entries() if self._holds_prompt(name))

    def check(self) -> None:
        """Raise NotServingError if the folder cannot be read."""
        self.entries()

    def entries(self) -> list[str]:
        """Return all legal names in the folder, unchecked; raises NotServingError if it cannot be read."""
        try:
            with os.scandir(self.path) as entries:
                return [self.name_of(entry.name) for entry in entries if is_name(entry.name)]
        except OSError as error:
            raise NotServingError(
                f"the folder of prompts cannot be read ({error.strerror}); mount it again"
            ) from error

    def name_of(self, folder: str) -> str:
        """Return the name that the prompt of a subfolder is served by."""
        name = folder
        while name in self.taken or (name != folder and (self.path / name).exists()):
            name += _RENAMED
        return name

    def signature(self, name: str) -> Signature:
        """Return the signature of a prompt's files, without reading them.

        Raises:
            AdapterError: There is no such prompt.
            NotServingError: The folder cannot be read.
        """
        directory = self._directory(name)
        return tuple(_stamp(directory / file) for file in FILES)

    def read(self, name: str, file: str, most: int) -> bytes | None:
        """Return a file of a prompt, None when it has none.

        Args:
            name: The prompt.
            file: One of ``FILES``.
            most: Maximum size in bytes.

        Raises:
            AdapterError: There is no such prompt.
            ArtifactError: The file is a link out of the root, too large, or cannot be read.
        """
        path = self._directory(name) / file
        if not os.path.lexists(path):
            return None
        real = Path(os.path.realpath(path))  # of a link to itself, resolve() raises until Python 3.13
        if not real.is_relative_to(self.path):
            raise ArtifactError(
                f"{name}/{file} is a link that leads out of the folder of prompts; copy the file there"
            )
        try:
            # NOFOLLOW refuses a link created after the check above, NONBLOCK never waits on a pipe.
            handle = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                os.close(handle)  # fdopen would keep that of a folder open
                raise ArtifactError(f"{name}/{file} is a folder, a device or a pipe; put a file there")
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
        path = self.path / self._subfolder(name)
        # A link out of the folder is treated as missing.
        if (
            not is_name(name)
            or name in self.taken
            or not path.is_dir()
            or not path.resolve().is_relative_to(self.path)
        ):
            if not self.path.is_dir():
                self.check()
            raise AdapterError(f"there is no prompt {excerpt(name)!r}; GET /v1/models lists them")
        return path

    def _subfolder(self, name: str) -> str:
        renamed = self.taken if name.endswith(_RENAMED) else ()
        return next((folder for folder in renamed if self.name_of(folder) == name), name)

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


_TASKS = 1000
"""Limit of tasks without names, whose number comes from a file."""


@dataclass(frozen=True, slots=True)
class Outline:
    """What a listing shows of a prompt, read from its configuration and its record.

    Attributes:
        signature: Signature of the files it was read from.
        created: When its configuration was written, Unix time in seconds.
        facts: Plain JSON values.
        problem: Why it cannot be read or served; None says nothing about the weights, which are not read.
    """

    signature: Signature
    created: int
    facts: dict[str, Any]
    problem: str | None = None


Fits = Callable[[dict[str, Any], Manifest | None], None]
"""Raises SoftPromptError unless a prompt's configuration and record fit the base."""


def outlined(root: PromptFolder, name: str, signature: Signature, most: int, fits: Fits) -> Outline:
    """Read the outline of a prompt; raises AdapterError if there is no such prompt."""
    stamp = signature[0]
    created = stamp[2] // 10**9 if stamp else 0
    if signature[FILES.index(WEIGHTS_NAME)] is None:
        problem = f"expected {WEIGHTS_NAME} in {name}, it has none: copy it there"
        return Outline(signature, created, {}, problem)
    try:
        config = _object(root, name, CONFIG_NAME, most) or {}
        check_config(config)
        record = _object(root, name, MANIFEST_NAME, most)
        manifest = None if record is None else Manifest.from_dict(record)
        tasks = tasks_of(config, manifest)
        fits(config, manifest)
    except SoftPromptError as error:
        return Outline(signature, created, {}, without_folders(in_options(str(error))))
    facts = {
        "peft_type": str(config["peft_type"]),
        "task_type": config.get("task_type"),
        "virtual_tokens": config.get("num_virtual_tokens"),
        "metrics": _scores(manifest),
        **(_reading(config, manifest) if tasks is None else _shared(tasks)),
        "tasks": tasks,
    }
    if config.get("task_type") == TaskType.FEATURE_EXTRACTION:
        facts |= {"task": "embedding", "labels": None}
    return Outline(signature, created, facts)


def tasks_of(config: Mapping[str, Any], manifest: Manifest | None) -> list[dict[str, Any]] | None:
    """Return kind, labels, template and ``chat`` of each task; None unless it is a multitask prompt.

    Raises:
        ArtifactError: The record of a task is invalid.
    """
    names = manifest.tasks if manifest and manifest.tasks else _numbers(config)
    if not names:
        return None
    return [
        {"name": name, **_reading(config, manifest and manifest_of_task(manifest, number))}
        for number, name in enumerate(names)
    ]


def _numbers(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the numbers of tasks, as names where the record has none."""
    count = config.get("num_tasks") or 1
    if config["peft_type"] != PeftType.MULTITASK_PROMPT_TUNING or count == 1:
        return ()
    if count > _TASKS:
        raise ArtifactError(
            f"expected at most {_TASKS:,} tasks without names, num_tasks is {count:,}: "
            f"name them in {MANIFEST_NAME}, or split the prompt"
        )
    return tuple(map(str, range(count)))


def _reading(config: Mapping[str, Any], manifest: Manifest | None) -> dict[str, Any]:
    """Return kind, labels and template of one task; a prompt without a record generates from any text.

    ``chat`` is the record's ``is_of_chats``, None without one.
    """
    if manifest is None:
        return {"task": "generation", "labels": None, "template": "{{input}}", "chat": None}
    labels, chat = list(manifest.labels) if manifest.labels else None, manifest.is_of_chats(config.get("placement"))
    return {"task": manifest.task, "labels": labels, "template": manifest.template, "chat": chat}


def _scores(manifest: Manifest | None) -> dict[str, float] | None:
    """Return the finite numbers among the recorded metrics, of the validation split where there was one."""
    if manifest is None:
        return None
    split = manifest.metrics.get("validation")
    found = split if isinstance(split, Mapping) else manifest.metrics
    return {name: value for name, value in found.items() if isinstance(value, float) and math.isfinite(value)}


def _shared(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what all tasks have in common, None where they differ."""
    first, *others = tasks
    return {
        key: first[key] if all(each[key] == first[key] for each in others) else None
        for key in ("task", "labels", "template", "chat")
    }


def _object(root: PromptFolder, name: str, file: str, most: int) -> dict[str, Any] | None:
    data = root.read(name, file, min(most, MOST_TEXT_BYTES))
    return None if data is None else parse_object(data.decode(errors="replace"), f"{name}/{file}")
