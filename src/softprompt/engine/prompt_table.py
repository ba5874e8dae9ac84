"""The prompts of a batch as tables: its virtual tokens, its keys and values, and which of them each row has."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from softprompt.backbone import Base
from softprompt.errors import ConfigError
from softprompt.prompts import Prompt

Part = Literal["input", "decoder"]
"""Where virtual tokens stand: in the (encoder's) input, or before a seq2seq decoder's."""


@dataclass(frozen=True, slots=True)
class PromptTable:
    """The virtual tokens of a batch of rows, made by ``PromptTable.of(prompts, part)``.

    Rows with the same ``Prompt`` object share its virtual tokens; equal prompts that are two objects
    do not.

    Attributes:
        table: All virtual tokens ``[N, H]``, token n with the id V + n; ``[0, 0]`` where there are none.
        starts: Table index of each batch row's first virtual token, ``[B]``, on the CPU.
        lengths: Virtual tokens of each batch row, 0 for none, ``[B]``, on the CPU.
        at: Real tokens of each batch row before its virtual ones, ``[B]``, on the CPU.
        sees_input: Whether an encoder's virtual tokens attend to the input.
    """

    table: Tensor
    starts: Tensor
    lengths: Tensor
    at: Tensor
    sees_input: bool = True

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt | None],
        part: Part = "input",
        *,
        at: Sequence[int] | None = None,
    ) -> Self:
        """Gather one part of the rows' prompts.

        Args:
            prompts: Each row's prompt, None for none; one without this part counts as none.
            part: Which part.
            at: Real tokens of each row before its virtual ones; None puts all in front.

        Raises:
            ConfigError: If some of the prompts see the input and others do not.
        """
        parts = {
            prompt: values
            for prompt in dict.fromkeys(prompts)
            if prompt is not None and (values := getattr(prompt, part)) is not None and len(values)
        }
        starts: dict[Prompt | None, int] = {}
        count = 0
        for prompt, values in parts.items():
            starts[prompt] = count
            count += len(values)
        lengths: dict[Prompt | None, int] = {prompt: len(v) for prompt, v in parts.items()}
        sees = {prompt.sees_input for prompt in parts} if part == "input" else set()
        if len(sees) > 1:
            raise ConfigError(
                "some prompts of a batch see the input and others do not; run them apart"
            )
        tables = list(parts.values()) or [torch.empty(0, 0)]
        return cls(
            # One prompt is passed on as the leaf it is: torch.compile cannot trace a hook that holds another.
            tables[0] if len(tables) == 1 else torch.cat(tables),
            torch.tensor([starts.get(prompt, 0) for prompt in prompts], dtype=torch.long),
            torch.tensor([lengths.get(prompt, 0) for prompt in prompts], dtype=torch.long),
            torch.tensor(at or [0] * len(prompts), dtype=torch.long),
            sees != {False},
        )

    @property
    def width(self) -> int:
        """Virtual tokens of the longest prompt in the batch (P)."""
        return int(self.lengths.max()) if self.lengths.numel() else 0

    @property
    def virtual_tokens(self) -> Tensor | None:
        """The virtual tokens to inject for a pass, ``[N, H]``; None where there are none."""
        return self.table if self.width else None

    def injected(self, base: Base, *, decoder: bool = False) -> AbstractContextManager[Any]:
        """Inject the virtual tokens into a base inside the context, which holds its lock.

        Without any, the base runs bit for bit as without this library.

        Args:
            base: The base.
            decoder: Whether they stand among the ids of a seq2seq model's decoder instead of its input.
        """
        if not self.width:
            return base.lock
        return base.running(virtual_tokens=self.table, decoder=decoder)

    def repeated(self, rows: int) -> PromptTable:
        """Return the same prompts for a batch whose rows were each repeated (beams, samples)."""
        times = rows // self.lengths.shape[0]
        return replace(
            self,
            starts=self.starts.repeat_interleave(times),
            lengths=self.lengths.repeat_interleave(times),
            at=self.at.repeat_interleave(times),
        )

    def ids(self, vocabulary: int) -> list[tuple[int, ...]]:
        """Return each row's virtual ids, counted from ``vocabulary`` (V)."""
        spans = zip(self.starts.tolist(), self.lengths.tolist(), strict=True)
        return [tuple(range(vocabulary + start, vocabulary + start + n)) for start, n in spans]


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
