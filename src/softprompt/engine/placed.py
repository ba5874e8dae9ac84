"""Rows as ids: a prompt is a stretch of ids from V on, in its place in the row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.engine.rows import EngineRow, is_keys_and_values


@dataclass(frozen=True, slots=True)
class PlacedPrompts:
    """The prompts of a pass in one table, and the ids of their rows.

    Attributes:
        table: All rows, ``[N, H]``; None when there are none.
        ids: The virtual ids of each used prompt.
    """

    table: Tensor | None
    ids: Mapping[int, tuple[int, ...]]

    @classmethod
    def of(cls, prompts: Sequence[Tensor], used: Iterable[int], vocabulary: int) -> PlacedPrompts:
        """Number the rows of the used prompts from ``vocabulary`` (V) on; -1 is no prompt.

        Prompts of keys and values have no rows.
        """
        ids: dict[int, tuple[int, ...]] = {}
        rows = []
        first = vocabulary
        for prompt in sorted({p for p in used if p >= 0}):
            if is_keys_and_values(prompts[prompt]):
                continue
            length = int(prompts[prompt].shape[0])
            ids[prompt] = tuple(range(first, first + length))
            first += length
            if length:
                rows.append(prompts[prompt])
        return cls(torch.cat(rows) if rows else None, ids)

    def ids_of(self, prompt: int) -> tuple[int, ...]:
        """Return the ids of a prompt, none for no prompt."""
        return self.ids.get(prompt, ())

    def source(self, row: EngineRow) -> tuple[int, ...]:
        """Return the ids of a row's input with its prompt in its place."""
        return (*row.source[: row.at], *self.ids_of(row.prompt), *row.source[row.at :])
