"""The prompts of one call's rows, lent to the base for its duration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.attach import heads
from softprompt.attach.choosing import RowPrompt
from softprompt.attach.heads import BASE
from softprompt.backbone import (
    Facts,
    VirtualVocabulary,
    frozen_linears,
    input_embedding,
    lent_bodies,
    locked,
    recomputed_alike,
    torch_products,
)
from softprompt.engine import Prefixes, Prompts, prefixed
from softprompt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PromptParts:
    """The value of one prompt by where it goes.

    Attributes:
        input: Rows ``[P, H]`` in the (encoder's) input, None where there are none.
        decoder: Rows ``[P, H]`` before the decoder's input of a seq2seq model, None where there are none.
        prefix: Keys and values ``[L, 2, A_kv, P, D]`` of the decoder's layers, None where there are none.
    """

    input: Tensor | None
    decoder: Tensor | None = None
    prefix: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LentPrompts:
    """The prompts of a batch; ids from V on mean rows of their common table.

    Attributes:
        input: Prompts in the (encoder's) input, None when no row has one.
        decoder: Prompts before the decoder's input, None when no row has one.
        placed: Whether a prompt may stand elsewhere than in front.
        prefixes: Keys and values before the tokens, None when no row has any.
    """

    input: Prompts | None
    decoder: Prompts | None
    placed: bool = False
    prefixes: Prefixes | None = None

    @classmethod
    def of(
        cls,
        rows: Sequence[RowPrompt],
        parts_of: Callable[[RowPrompt], PromptParts],
        *,
        sees_input: bool,
        at: Sequence[int] | None,
    ) -> Self:
        """Gather the prompts of rows; each value is made once, however many rows share it."""
        distinct = [row for row in dict.fromkeys(rows) if row.name != BASE]
        parts = [parts_of(row) for row in distinct]
        number = {row: i for i, row in enumerate(distinct)}
        chosen = [number.get(row, -1) for row in rows]
        first = _gathered([part.input for part in parts], chosen, sees_input, at)
        second = _gathered([part.decoder for part in parts], chosen, True, None)
        if first is not None and second is not None:
            table = torch.cat([first.table, second.table])
            second = replace(second, table=table, starts=second.starts + len(first.table))
            first = replace(first, table=table)
        prefixes = [part.prefix for part in parts if part.prefix is not None]
        kept = Prefixes.of(prefixes, chosen) if prefixes else None
        return cls(first, second, at is not None, kept)

    @property
    def table(self) -> Tensor | None:
        """All rows, ``[N, H]``; None when there are none."""
        either = self.input or self.decoder
        return None if either is None else either.table


def _gathered(
    values: Sequence[Tensor | None],
    chosen: Sequence[int],
    sees_input: bool,
    at: Sequence[int] | None,
) -> Prompts | None:
    """Return the prompts of those rows whose prompt has this part, None when no row's has."""
    having = [i for i, value in enumerate(values) if value is not None]
    choice = [having.index(c) if c in having else -1 for c in chosen]
    if all(c < 0 for c in choice):
        return None
    return Prompts.of([v for v in values if v is not None], choice, sees_input, at)


@contextmanager
def lent(
    model: PreTrainedModel,
    facts: Facts,
    vocabulary: VirtualVocabulary,
    rows: Sequence[RowPrompt],
    prompts: LentPrompts,
) -> Iterator[LentPrompts]:
    """Lend prompts to the embedding, or to attention, and switch the heads to each row's own.

    The context holds the model's lock: threads take turns.

    Raises:
        ConfigError: If the embedding table was resized since the prompts were attached.
    """
    size = input_embedding(model).weight.shape[0]
    if size != vocabulary.size:
        raise ConfigError(
            f"the embedding table had {vocabulary.size:,} rows when the prompts were attached, now it has "
            f"{size:,}; resize it first, then attach"
        )
    names = [row.name for row in rows]
    behind = nullcontext() if prompts.prefixes is None else prefixed(model, facts, prompts.prefixes)
    # Without a prompt it is the base, bit for bit, inside another pass too.
    bare = prompts.table is None and prompts.prefixes is None
    own = torch_products() if bare and not torch.compiler.is_compiling() else nullcontext()
    with locked(model), behind, own, lent_bodies(frozen_linears(model)), recomputed_alike(model):
        switches = [switch for _, switch in heads.switches_of(model)]
        for switch in switches:
            switch.active = names[0] if len(set(names)) == 1 else tuple(names)
        try:
            with vocabulary.inject(prompts.table):
                yield prompts
        finally:
            for switch in switches:
                switch.active = None
