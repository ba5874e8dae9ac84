"""Which task of a multitask prompt is meant, and what is on record of it."""

from __future__ import annotations

from collections.abc import Sequence

from softprompt.artifacts import Manifest
from softprompt.errors import ConfigError, excerpt, nearest

Task = str | int
"""A task of a multitask prompt, by its name or its number."""

TaskNames = Task | Sequence[Task]
"""One task for all rows, or one for each."""


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
            f"this prompt has {count} tasks ({known}); choose one by name or number: task_name=..., "
            "--task-name on the command line, or task in a request to a server"
        )
    if task in names:
        return names.index(str(task))
    number = int(task) if str(task).isdecimal() else count
    if number < count:
        return number
    given = repr(excerpt(task)) if isinstance(task, str) else task
    raise ConfigError(
        f"this prompt has no task {given}{nearest(str(task), names)}; its tasks are {known}"
    )


def rows_by_task(
    chosen: TaskNames, manifest: Manifest, count: int, rows: int
) -> dict[int, list[int]]:
    """Return the rows of each chosen task, by its number.

    Raises:
        ConfigError: there is no such task, or not one for each row.
    """
    if isinstance(chosen, str | int):
        return {task_number(chosen, manifest, count): list(range(rows))}
    if len(chosen) != rows:
        raise ConfigError(
            f"task_name takes one task, or one for each of the {rows:,} rows; got {len(chosen):,}"
        )
    found: dict[int, list[int]] = {}
    for row, task in enumerate(chosen):
        found.setdefault(task_number(task, manifest, count), []).append(row)
    return found
