"""Keys and values that stand before the tokens of each row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from softprompt.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Prefixes:
    """The prefixes of a batch of rows and which row has which, made by ``Prefixes.of(prompts)``.

    Rows with the same ``Prompt`` object share it.

    Attributes:
        table: Keys and values, padded behind to the longest, ``[K, L, 2, A_kv, P, D]``.
        owner: Prefix of each row, -1 for none, ``[B]``.
        lengths: Virtual tokens of each row's prefix, 0 for none, ``[B]``.
    """

    table: Tensor
    owner: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Prompt | None]) -> Self | None:
        """Gather the prefixes of rows, None when no row has one.

        Args:
            prompts: Each row's prompt, None for none; one without keys and values counts as none.
        """
        found = {
            prompt: prompt.prefix
            for prompt in dict.fromkeys(prompts)
            if prompt is not None and prompt.prefix is not None
        }
        if not found:
            return None
        width = max(prompt.prefix_tokens for prompt in found)
        number: dict[Prompt | None, int] = {prompt: i for i, prompt in enumerate(found)}
        padded = [F.pad(p, (0, 0, 0, width - int(p.shape[3]))) for p in found.values()]
        lengths = [p.prefix_tokens if p is not None and p in number else 0 for p in prompts]
        device = padded[0].device
        return cls(
            torch.stack(padded) if len(padded) > 1 else padded[0].unsqueeze(0),
            torch.tensor([number.get(prompt, -1) for prompt in prompts], device=device),
            torch.tensor(lengths, device=device),
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
        """Return a layer's keys and values ``[B, A_kv, P, D]``, in dtype and on the device of ``like``."""
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
        """Put the prefixes into an empty cache, in dtype and on the device of ``like``."""
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
