"""Keys and values that stand before the tokens of each row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from softprompt.engine.rows import is_keys_and_values


def virtual_length(prompt: Tensor) -> int:
    """Return the virtual tokens (P) of a prompt of either kind."""
    return int(prompt.shape[3 if is_keys_and_values(prompt) else 0])


@dataclass(frozen=True, slots=True)
class Prefixes:
    """The prefixes of one batch and which row has which.

    Attributes:
        table: Keys and values, padded behind to the longest, ``[K, L, 2, A_kv, P, D]``.
        owner: Prefix of each row, -1 for none, ``[B]``.
        lengths: Virtual tokens of each row's prefix, 0 for none, ``[B]``.
    """

    table: Tensor
    owner: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Tensor], choice: Sequence[int]) -> Self | None:
        """Gather the prefixes among the prompts of a call, None when no row has one.

        Args:
            prompts: Prompts of both kinds; those that no row uses get no gradient.
            choice: Each row's prompt, -1 for none.
        """
        used = sorted({c for c in choice if c >= 0 and is_keys_and_values(prompts[c])})
        if not used:
            return None
        width = max(virtual_length(prompts[c]) for c in used)
        padded = [F.pad(prompts[c], (0, 0, 0, width - virtual_length(prompts[c]))) for c in used]
        lengths = {c: virtual_length(prompts[c]) for c in used}
        device = padded[0].device
        return cls(
            torch.stack(padded) if len(used) > 1 else padded[0].unsqueeze(0),
            torch.tensor([used.index(c) if c in used else -1 for c in choice], device=device),
            torch.tensor([lengths.get(c, 0) for c in choice], device=device),
        )

    @property
    def width(self) -> int:
        """Length of the longest prefix (P)."""
        return int(self.table.shape[4])

    @property
    def layers(self) -> int:
        """Layers (L)."""
        return int(self.table.shape[1])

    def repeated(self, rows: int) -> Prefixes:
        """Return the same prefixes for a batch whose rows were each repeated (beams, samples)."""
        times = rows // self.lengths.shape[0]
        if times == 1:
            return self
        return replace(
            self,
            owner=self.owner.repeat_interleave(times),
            lengths=self.lengths.repeat_interleave(times),
        )

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values ``[B, A_kv, P, D]``, in dtype and place of ``like``."""
        values = self.table[:, index].to(like.device, like.dtype)  # [K, 2, A_kv, P, D]
        owner = self.owner.to(like.device)
        if values.shape[0] == 1:
            # Rows without a prefix get one that their mask hides.
            rows = values.expand(owner.shape[0], -1, -1, -1, -1)
        else:
            rows = values.index_select(0, owner.clamp(min=0))
        return rows[:, 0], rows[:, 1]

    def columns(self) -> Tensor:
        """Return which columns of shifted prefixes are real, bool ``[B, P]``."""
        column = torch.arange(self.width, device=self.lengths.device)
        return column >= self.width - self.lengths.unsqueeze(1)

    def fill(self, cache: Cache, like: Tensor) -> None:
        """Put the prefixes into an empty cache, in dtype and place of ``like``."""
        for index in range(self.layers):
            cache.update(*self.layer(index, like), index)

    def shifted(self) -> Prefixes:
        """Return the same prefixes padded in front, so that each ends in the last column."""
        width = self.width
        lengths = [0] * self.table.shape[0]
        for owner, length in zip(self.owner.tolist(), self.lengths.tolist(), strict=True):
            lengths[owner if owner >= 0 else 0] = max(length, lengths[owner if owner >= 0 else 0])
        rolled = [part.roll(width - n, dims=3) for part, n in zip(self.table, lengths, strict=True)]
        return replace(self, table=torch.stack(rolled))
