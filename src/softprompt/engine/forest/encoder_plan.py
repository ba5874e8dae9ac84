"""What an encoder runs for a batch, and which of its states each input owns.

The prompt sees the input: one row for each input, its prompt in its place. It does not: the
prompts once, and one row for each input that sees its prompt and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.engine.forest.plan import Plan
from softprompt.engine.forest.visibility import Span
from softprompt.engine.placed import PlacedPrompts
from softprompt.engine.rows import EngineRow


@dataclass(frozen=True, slots=True)
class EncoderPlan:
    """An encoder's pass, and what its rows mean to a decoder.

    Attributes:
        plan: The pass.
        owners: The input each row of the batch has; rows with one input and prompt share it.
        owned: Tokens of the stream whose states each input owns, in the order of its row.
    """

    plan: Plan
    owners: tuple[int, ...]
    owned: tuple[Tensor, ...]


def encoder_plan(rows: Sequence[EngineRow], placed: PlacedPrompts, sees_input: bool) -> EncoderPlan:
    """Plan the encoder rows of a batch.

    Args:
        rows: The rows; prompts that do not see the input stand in front of it.
        placed: The encoder's prompts.
        sees_input: Whether the prompt sees the input.
    """
    prompt_of = {placed.source(row): row.prompt for row in rows}
    sources = list(prompt_of.items())
    number = {source: i for i, source in enumerate(prompt_of)}
    owners = tuple(number[placed.source(row)] for row in rows)
    if sees_input:
        own = _indices([source for source, _ in sources])
        sequences = [(0, source) for source, _ in sources]
        return EncoderPlan(_plan(sequences, own, own), owners, tuple(own))
    shared = sorted(prompt for prompt, ids in placed.ids.items() if ids)
    above = [len(placed.ids_of(prompt)) for _, prompt in sources]
    sequences = [
        *((0, placed.ids_of(prompt)) for prompt in shared),
        *((length, source[length:]) for length, (source, _) in zip(above, sources, strict=True)),
    ]
    own = _indices([ids for _, ids in sequences])
    states = {prompt: index for prompt, index in zip(shared, own, strict=False)}
    owned = [
        torch.cat([states[prompt], index]) if prompt in states else index
        for (_, prompt), index in zip(sources, own[len(shared) :], strict=True)
    ]
    return EncoderPlan(_plan(sequences, own, [*own[: len(shared)], *owned]), owners, tuple(owned))


def _plan(
    sequences: Sequence[tuple[int, tuple[int, ...]]], own: Sequence[Tensor], seen: Sequence[Tensor]
) -> Plan:
    """Return the pass of sequences with first positions, each seeing all of the given tokens."""
    spans = [
        Span(queries, keys, torch.ones(len(queries), len(keys), dtype=torch.bool))
        for queries, keys in zip(own, seen, strict=True)
    ]
    ids = torch.tensor([token for _, ids in sequences for token in ids], dtype=torch.long)
    positions = torch.cat([torch.arange(start, start + len(ids)) for start, ids in sequences])
    return Plan(ids, positions, (tuple(spans),))


def _indices(sequences: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return the stream indices of each sequence."""
    at, found = 0, []
    for ids in sequences:
        found.append(torch.arange(at, at + len(ids)))
        at += len(ids)
    return found
