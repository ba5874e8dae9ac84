"""What an encoder runs for a batch of sources, and which of its states each source owns.

The prompt sees the input: one row ``[prompt | source]`` for each source. It does not: the
prompts once, and one row for each source that sees its prompt and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.engine.visibility import Span, Visibility, padded


@dataclass(frozen=True, slots=True)
class EncoderPlan:
    """Rows of an encoder pass.

    Attributes:
        rows: First position and ids of each row; ids from V on are virtual.
        sees: Packed indices each row's tokens see, its own among them.
        keys: Packed indices of the states each source owns, prompt first.
        used: Prompts of the call in the order their rows stand in the table.
    """

    rows: tuple[tuple[int, tuple[int, ...]], ...]
    sees: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    used: tuple[int, ...]

    @property
    def positions(self) -> Tensor:
        """Position of each packed token in ``[prompt | source]``, ``[N]``."""
        return torch.cat([torch.arange(start, start + len(ids)) for start, ids in self.rows])

    def padded(self, pad_id: int) -> tuple[Tensor, Tensor]:
        """Return ids and mask ``[R, W]``, each row at its own positions."""
        width = max(start + len(ids) for start, ids in self.rows)
        ids = torch.full((len(self.rows), width), pad_id)
        mask = torch.zeros_like(ids)
        for i, (start, row) in enumerate(self.rows):
            ids[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, start : start + len(row)] = 1
        return ids, mask

    def visibility(self) -> Visibility:
        """Return who sees whom in the packed rows."""
        spans, at = [], 0
        for (_, ids), seen in zip(self.rows, self.sees, strict=True):
            own = torch.arange(at, at + len(ids))
            spans.append(Span(own, seen, torch.ones(len(own), len(seen), dtype=torch.bool)))
            at += len(ids)
        positions = self.positions
        return padded([spans], positions, positions)


def encoder_plan(
    sources: Sequence[tuple[int, tuple[int, ...]]],
    lengths: Sequence[int],
    vocabulary: int,
    sees_input: bool,
) -> EncoderPlan:
    """Plan the encoder rows of sources.

    Args:
        sources: Prompt (-1 for none) and ids of each source.
        lengths: Length of each prompt of the call.
        vocabulary: First virtual id (V).
        sees_input: Whether the prompt sees the input.
    """
    used = sorted({prompt for prompt, _ in sources if prompt >= 0})
    virtual: dict[int, tuple[int, ...]] = {-1: ()}
    first = vocabulary
    for prompt in used:
        virtual[prompt] = tuple(range(first, first + lengths[prompt]))
        first += lengths[prompt]
    if sees_input:
        rows = [(0, virtual[prompt] + source) for prompt, source in sources]
        own = _indices(rows)
        return EncoderPlan(tuple(rows), tuple(own), tuple(own), tuple(used))
    shared = [(0, virtual[prompt]) for prompt in used]
    rows = [*shared, *((len(virtual[prompt]), source) for prompt, source in sources)]
    own = _indices(rows)
    above = {-1: torch.empty(0, dtype=torch.long)} | dict(zip(used, own, strict=False))
    keys = [
        torch.cat([above[prompt], index])
        for (prompt, _), index in zip(sources, own[len(used) :], strict=True)
    ]
    return EncoderPlan(tuple(rows), (*own[: len(used)], *keys), tuple(keys), tuple(used))


def _indices(rows: Sequence[tuple[int, tuple[int, ...]]]) -> list[Tensor]:
    at, found = 0, []
    for _, ids in rows:
        found.append(torch.arange(at, at + len(ids)))
        at += len(ids)
    return found
