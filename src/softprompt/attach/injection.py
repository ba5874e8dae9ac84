"""Injects a batch's prompts into the base model for one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.attach import heads
from softprompt.backbone import Base, Facts, VirtualVocabulary
from softprompt.engine import Prefixes, PromptTable, prefixed
from softprompt.errors import ConfigError
from softprompt.prompts import Prompt


@dataclass(frozen=True, slots=True)
class BatchPrompts:
    """The prompts of a batch as the engine's tables; ids from V on mean virtual tokens of a common one.

    Attributes:
        input: Virtual tokens in the (encoder's) input, None when no row has any.
        decoder: Virtual tokens before the decoder's input, None when no row has any.
        has_offsets: Whether a prompt may stand elsewhere than in front.
        prefixes: Keys and values before the tokens, None when no row has any.
    """

    input: PromptTable | None
    decoder: PromptTable | None
    has_offsets: bool = False
    prefixes: Prefixes | None = None

    @classmethod
    def of(cls, prompts: Sequence[Prompt | None], *, at: Sequence[int] | None) -> Self:
        """Gather the prompts of a batch, each object once however many rows share it.

        Args:
            prompts: The prompt of each row, ``[B]``.
            at: Real tokens of each row before its prompt; None puts every prompt in front.

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
        return cls(first, second, at is not None, Prefixes.of(prompts))

    @property
    def table(self) -> Tensor | None:
        """All virtual tokens, ``[N, H]``; None when there are none."""
        either = self.input or self.decoder
        return None if either is None else either.table


@contextmanager
def injected(
    model: PreTrainedModel,
    facts: Facts,
    vocabulary: VirtualVocabulary,
    prompts: BatchPrompts,
    names: Sequence[str],
) -> Iterator[BatchPrompts]:
    """Give the embedding, or attention, the prompts of a batch, and switch the heads to each row's own.

    The context holds the model's lock: threads take turns.

    Args:
        model: The base.
        facts: Its facts.
        vocabulary: The hook of its input embedding.
        prompts: What to inject.
        names: The adapter of each row, whose heads run; ``__base__`` for the base's, ``[B]``.

    Raises:
        ConfigError: If the embedding table was resized since the prompts were attached.
    """
    base = Base.of(model)
    size = base.embedding.weight.shape[0]
    if size != vocabulary.size:
        raise ConfigError(
            f"the embedding table had {vocabulary.size:,} rows when the prompts were attached, now it has "
            f"{size:,}; resize it first, then attach"
        )
    behind = nullcontext() if prompts.prefixes is None else prefixed(base, prompts.prefixes)
    # Without a prompt it is the base, bit for bit, inside another pass too.
    bare = prompts.table is None and prompts.prefixes is None
    running = base.running(virtual_tokens=prompts.table, vocabulary=vocabulary, bare=bare)
    with base.lock, behind, running:
        switches = [switch for _, switch in heads.switches_of(model)]
        for switch in switches:
            switch.active = names[0] if len(set(names)) == 1 else tuple(names)
        try:
            yield prompts
        finally:
            for switch in switches:
                switch.active = None
