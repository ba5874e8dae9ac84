"""Which prompt, and which task of it, each row of a batch gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softprompt.attach.heads import BASE
from softprompt.errors import AdapterError, ConfigError

TaskIds = Tensor | Sequence[int] | int
"""One task for the batch, or one a row."""


class RowPrompt(NamedTuple):
    """The prompt of one row: its name, ``__base__`` for none, and its task."""

    name: str
    task: int = 0


def chosen_rows(
    names: Sequence[str] | None,
    task_ids: TaskIds | None,
    *,
    active: str,
    batch: int,
    tasks_of: Callable[[str], int | None],
) -> list[RowPrompt]:
    """Return one prompt a row: the caller's names, or the active prompt for all.

    Args:
        names: A name for each row, or None.
        task_ids: A task for each row or for all; needed by prompts of several tasks. Rows of other
            prompts, and of none, have 0.
        active: The active prompt.
        batch: Rows of the call.
        tasks_of: Gives the tasks (K) of a named multitask prompt, None for any other prompt.

    Raises:
        AdapterError: If there is not one name a row.
        ConfigError: If task ids are missing, given to prompts without tasks, or out of range.
    """
    chosen = [active] * batch if names is None else list(names)
    if len(chosen) != batch:
        raise AdapterError(
            f"adapter_names must hold one name a row: {batch} rows, got {len(chosen)} names"
        )
    known = {name: None if name == BASE else tasks_of(name) for name in dict.fromkeys(chosen)}
    if task_ids is None:
        for name, count in known.items():
            if count is not None and count > 1:
                raise ConfigError(
                    f"task_ids cannot be None: {name!r} has {count} tasks; give the task of each row"
                )
        return [RowPrompt(name) for name in chosen]
    if all(count is None for count in known.values()):
        raise ConfigError(
            "task_ids belong to multitask prompts; this prompt has one task, leave them out"
        )
    tasks = one_a_row("task_ids", task_ids, batch)
    for name, task in set(zip(chosen, tasks, strict=True)):
        count = known[name]
        if count is None and task:
            raise ConfigError(
                f"task_ids of rows without tasks are 0, row prompt {name!r} has got {task}; use 0 there"
            )
        if count is not None and not 0 <= task < count:
            raise ConfigError(
                f"task_ids of {name!r} go from 0 to {count - 1}, got {task}; use one of those"
            )
    return [RowPrompt(name, task) for name, task in zip(chosen, tasks, strict=True)]


def one_a_row(what: str, values: Tensor | Sequence[int] | int, batch: int) -> list[int]:
    """Return one integer a row from one for all, or one for each.

    Raises:
        ConfigError: If ``values`` is something else; ``what`` names it.
    """
    try:
        given = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        given = None
    whole = given is not None and not given.is_floating_point() and given.dtype != torch.bool
    if given is None or not whole or given.dim() > 1 or given.numel() not in (1, batch):
        came = repr(values) if given is None else f"{given.dtype} {list(given.shape)}"
        raise ConfigError(
            f"{what} must be one integer, or one for each of the {batch} rows, got "
            f"{came.removeprefix('torch.')}"
        )
    return [int(value) for value in given.expand(batch).tolist()]
