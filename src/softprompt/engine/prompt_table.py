"""The virtual tokens of one batch in one table, and which of them each row has."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

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
    def injected(self) -> Tensor | None:
        """The virtual tokens to inject for a pass, ``[N, H]``; None where there are none."""
        return self.table if self.width else None

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


def injected(
    base: Base, prompts: PromptTable, *, decoder: bool = False
) -> AbstractContextManager[Any]:
    """Inject virtual tokens into the model's embedding inside the context, which holds its lock.

    Args:
        base: The base.
        prompts: The virtual tokens; without any the model is left alone.
        decoder: Whether they stand among the ids of a seq2seq model's decoder instead of its input.
    """
    if not prompts.width:
        return base.lock
    return base.running(virtual_tokens=prompts.table, decoder=decoder)
