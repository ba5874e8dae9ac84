"""Which task of a multitask prompt is meant, and what is on record of it."""

from __future__ import annotations

from softprompt.artifacts.manifest import Manifest
from softprompt.errors import ConfigError, nearest

Task = str | int
"""A task of a multitask prompt, by its name or its number."""


def task_number(task: Task | None, manifest: Manifest, count: int) -> int:
    """Return the number of a task of a prompt that has ``count`` of them.

    Raises:
        ConfigError: there is no such task, or none is named where there are several.
    """
    names = manifest.tasks or tuple(map(str, range(count)))
    known = ", ".join(names)
    if task is None:
        if count == 1:
            return 0
        raise ConfigError(
            f"this prompt has {count} tasks ({known}); choose one with task=... (--task-name)"
        )
    if task in names:
        return names.index(str(task))
    number = int(task) if str(task).isdecimal() else count
    if number < count:
        return number
    raise ConfigError(
        f"this prompt has no task {task!r}{nearest(str(task), names)}; its tasks are {known}"
    )
