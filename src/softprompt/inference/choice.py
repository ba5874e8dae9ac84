"""The prompt, and the task of a multitask prompt, that each input names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from softprompt.artifacts import Manifest
from softprompt.errors import ConfigError, excerpt, nearest
from softprompt.inference.inputs import Fields, listed

Task = str | int
"""A task of a multitask prompt, by its name or its number."""

TaskNames = Task | Sequence[Task]
"""One task for all rows, or one for each."""

Names = str | Sequence[str]
"""One prompt for all inputs, or one for each."""

Tasks = Task | Sequence[Task | None] | None
"""One task for all inputs, or one for each; None where a prompt has one."""


@dataclass(frozen=True, slots=True)
class Addressed:
    """An input, with the prompt and the task that answer it."""

    request: Fields
    prompt: str
    task: Task | None


def check_names(names: Iterable[object]) -> None:
    """Check the names of prompts.

    Raises:
        ConfigError: There is none, or one is no text.
    """
    given = list(names)
    if not given:
        raise ConfigError("expected at least one prompt to serve, got none; name one")
    for name in given:
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"expected a text as the name of a prompt, got {name!r}; call it by a word"
            )


def addressed(
    requests: Fields | Iterable[Fields], prompts: Names, task_name: Tasks
) -> list[Addressed]:
    """Return each input with the prompt and the task that answer it.

    Raises:
        ConfigError: There is not one prompt, or one task, for each input.
    """
    inputs = listed(requests)
    names = [prompts] * len(inputs) if isinstance(prompts, str) else list(prompts)
    tasks: list[Task | None]
    if task_name is None or isinstance(task_name, str | int):
        tasks = [task_name] * len(inputs)
    else:
        tasks = list(task_name)
    for what, count in (("prompts", len(names)), ("task_name", len(tasks))):
        if count != len(inputs):
            raise ConfigError(
                f"{what} expects one name, or one for each of the {len(inputs)} inputs, got {count}"
            )
    return [Addressed(*each) for each in zip(inputs, names, tasks, strict=True)]


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
