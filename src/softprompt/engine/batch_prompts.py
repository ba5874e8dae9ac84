"""The prompts of one batch, as tables that a pass of the base reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from softprompt.backbone import Base, VirtualVocabulary
from softprompt.engine.prefixes import prefixed
from softprompt.engine.rows import Prefixes, PromptTable
from softprompt.prompts import Prompt


@dataclass(frozen=True, slots=True)
class BatchPrompts:
    """The prompts of a batch by where they stand; all virtual tokens are in one table, with ids from V on.

    Attributes:
        input: Virtual tokens in the (encoder's) input, None when no row has any.
        decoder: Virtual tokens before the decoder's input, None when no row has any.
        prefixes: Keys and values before the tokens, None when no row has any.
    """

    input: PromptTable | None
    decoder: PromptTable | None
    prefixes: Prefixes | None = None

    @classmethod
    def of(cls, prompts: Sequence[Prompt | None], *, at: Sequence[int] | None = None) -> Self:
        """Gather the prompts of a batch, each object once however many rows share it.

        Args:
            prompts: The prompt of each row, None for none, ``[B]``.
            at: Real tokens of each row before its virtual ones; None puts all in front.

        Raises:
            ConfigError: If they differ in whether they see the input.
        """
        first = second = None
        if any(each is not None and each.input is not None for each in prompts):
            first = PromptTable.of(prompts, "input", at=at)
        if any(each is not None and each.decoder is not None for each in prompts):
            second = PromptTable.of(prompts, "decoder")
        if first is not None and second is not None:
            table = torch.cat([first.table, second.table])
            second = replace(second, table=table, starts=second.starts + len(first.table))
            first = replace(first, table=table)
        return cls(first, second, Prefixes.of(prompts))

    @property
    def table(self) -> Tensor | None:
        """All virtual tokens, ``[N, H]``; None when there are none."""
        either = self.input or self.decoder
        return None if either is None else either.table

    @contextmanager
    def injected(self, base: Base, vocabulary: VirtualVocabulary | None = None) -> Iterator[None]:
        """Inject the prompts into the base for the passes inside the context, which holds its lock.

        Without any prompt the base runs bit for bit as without this library.

        Args:
            base: The base.
            vocabulary: Hooks that are on the base's embeddings already; None makes and removes some.

        Raises:
            BackboneError: If the base does not support prefixes, and there are some.
        """
        prefixes = self.prefixes
        behind = nullcontext() if prefixes is None else prefixed(base, prefixes)
        bare = self.table is None and prefixes is None
        with (
            behind,
            base.running(virtual_tokens=self.table, vocabulary=vocabulary, bare=bare),
        ):
            yield
