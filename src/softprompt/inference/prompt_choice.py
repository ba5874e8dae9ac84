"""Which of many prompts, and which of its tasks, each input is for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from softprompt.errors import ConfigError
from softprompt.inference.requests import Request, listed
from softprompt.inference.task_choice import Task

Names = str | Sequence[str]
"""One prompt for all inputs, or one for each."""

Tasks = Task | Sequence[Task | None] | None
"""One task for all inputs, or one for each; None where a prompt has one."""


@dataclass(frozen=True, slots=True)
class Addressed:
    """An input, and the prompt and task that are to answer it."""

    request: Request
    prompt: str
    task: Task | None


def check_names(names: Iterable[object]) -> None:
    """Refuse names that no prompt can be asked for by.

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
    requests: Request | Iterable[Request], prompts: Names, task_name: Tasks
) -> list[Addressed]:
    """Return each input with the prompt and the task that are asked for.

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
