"""Rows of a test by the numbers of their prompts, and the engine's rows made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from softprompt.engine import EngineRow
from softprompt.prompts import Prompt


@dataclass(frozen=True)
class RowCase:
    """A row whose prompt is one of a list of tensors.

    Attributes:
        source: Token ids of the input.
        target: Token ids of the answer.
        prompt: Which tensor stands in its input, or before it as keys and values; -1 is none.
        at: Source tokens before it.
        decoder: Which tensor stands before the decoder's input; -1 is none.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    prompt: int = 0
    at: int = 0
    decoder: int = -1


def engine_rows(cases: Sequence[RowCase], tensors: Sequence[Tensor], *, sees_input: bool = True) -> list[EngineRow]:
    """Return engine rows; cases with the same numbers share one ``Prompt``."""
    prompts: dict[tuple[int, int], Prompt | None] = {(-1, -1): None}
    for case in cases:
        key = (case.prompt, case.decoder)
        if key not in prompts:
            first, second = (None if number < 0 else tensors[number] for number in key)
            prompts[key] = prompt_of(first, second, sees_input=sees_input)
    return [EngineRow(case.source, case.target, prompts[case.prompt, case.decoder], case.at) for case in cases]


def prompt_of(first: Tensor | None, second: Tensor | None = None, *, sees_input: bool = True) -> Prompt:
    """Return the prompt of what stands before the input and the decoder's, or of keys and values."""
    for value in (first, second):
        if value is not None and value.dim() == 5:
            return Prompt(prefix=value)
    return Prompt(first, second, sees_input=sees_input)
