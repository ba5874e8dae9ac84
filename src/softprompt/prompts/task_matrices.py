"""First values of a multitask prompt's factors, as pure functions.

Columns ``[K, S·P, R]`` times rows ``[K, R, H]`` are the task matrices ``[K, S·P, H]`` that the shared
rows are multiplied with, number by number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.errors import ConfigError
from softprompt.prompts.module import PROMPT_KEY

COLS_KEY = "prefix_task_cols"
ROWS_KEY = "prefix_task_rows"

_STD = 0.02


@dataclass(frozen=True, slots=True)
class TaskMatrices:
    """Both factors of all task matrices."""

    cols: Tensor
    rows: Tensor

    @classmethod
    def ones(
        cls, size: tuple[int, int, int, int], generator: torch.Generator | None
    ) -> TaskMatrices:
        """Return factors whose product is exactly 1, for (K, S·P, R, H).

        The first rank is ones times ones. The columns of the others are drawn from N(0, 1) and their
        rows are 0: the product stays 1, each rank learns as fast as the first, and no two ranks get
        the same gradient, as they would if all were alike.
        """
        tasks, length, rank, width = size
        cols = torch.randn(tasks, length, rank, generator=generator) if rank > 1 else None
        cols = torch.ones(tasks, length, rank) if cols is None else cols
        cols[..., 0] = 1
        rows = torch.zeros(tasks, rank, width)
        rows[:, 0] = 1
        return cls(cols, rows)

    @classmethod
    def normal(
        cls, size: tuple[int, int, int, int], generator: torch.Generator | None
    ) -> TaskMatrices:
        """Return PEFT's start for (K, S·P, R, H): both factors from N(0, 0.02²)."""
        tasks, length, rank, width = size
        cols = torch.normal(0.0, _STD, (tasks, length, rank), generator=generator)
        return cls(cols, torch.normal(0.0, _STD, (tasks, rank, width), generator=generator))

    def average(self) -> TaskMatrices:
        """Return one task whose factors are the means over the tasks, each by itself, as in PEFT."""
        return TaskMatrices(
            self.cols.mean(dim=0, keepdim=True), self.rows.mean(dim=0, keepdim=True)
        )

    def only(self, task: int) -> TaskMatrices:
        """Return one task, that of an id.

        Raises:
            ConfigError: If there is no such task.
        """
        count = self.cols.shape[0]
        if not 0 <= task < count:
            raise ConfigError(
                f"prompt_tuning_init_task must be one of the source's {count} tasks, 0 to {count - 1}, got {task}"
            )
        return TaskMatrices(self.cols[task : task + 1], self.rows[task : task + 1])

    def repeated(self, tasks: int) -> TaskMatrices:
        """Return as many copies of a single task."""
        return TaskMatrices(self.cols.repeat(tasks, 1, 1), self.rows.repeat(tasks, 1, 1))


@dataclass(frozen=True, slots=True)
class SourcePrompt:
    """A trained prompt that another one starts from: shared rows ``[S·P, H]``, and factors if it has tasks."""

    embeddings: Tensor
    matrices: TaskMatrices | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], where: str) -> SourcePrompt:
        """Return the source prompt that named tensors hold.

        Args:
            tensors: ``prompt_embeddings``, and ``prefix_task_cols`` with ``prefix_task_rows`` or neither.
            where: Where they were read, for messages.

        Raises:
            ConfigError: If they are no such prompt.
        """
        missing = {PROMPT_KEY, COLS_KEY, ROWS_KEY} - tensors.keys()
        if missing not in (set(), {COLS_KEY, ROWS_KEY}):
            raise ConfigError(
                f"the source prompt {where} lacks {', '.join(sorted(missing))}, it holds "
                f"{', '.join(sorted(tensors)[:4]) or 'nothing'}; give the weights file of a multitask prompt"
            )
        embeddings = tensors[PROMPT_KEY].float()
        factors = None if missing else (tensors[COLS_KEY].float(), tensors[ROWS_KEY].float())
        shapes = [list(each.shape) for each in (embeddings, *(factors or ()))]
        if not _agree(shapes):
            raise ConfigError(
                f"the source prompt {where} must hold prompt_embeddings [S*P, H], prefix_task_cols "
                f"[K, S*P, R] and prefix_task_rows [K, R, H], it holds {', '.join(map(str, shapes))}"
            )
        if not all(bool(each.isfinite().all()) for each in (embeddings, *(factors or ()))):
            raise ConfigError(f"the source prompt {where} holds NaN or infinity; use another one")
        return cls(embeddings, None if factors is None else TaskMatrices(*factors))


def _agree(shapes: list[list[int]]) -> bool:
    if [len(shape) for shape in shapes] not in ([2], [2, 3, 3]):
        return False
    if len(shapes) == 1:
        return True
    (length, width), cols, rows = shapes
    return cols == [rows[0], length, rows[1]] and rows[2] == width and rows[0] > 0
