"""The plan of one pass: its tokens, each computed once, who sees whom, and what is predicted.

Causal rows, decoder rows (``causal_plan.py``) and encoder rows (here) are all run from such a
plan; they differ in how it is made. What an encoder runs depends on its prompts. They see the
input: one sequence for each input, its prompt at its position. They do not: the prompts once, and
one sequence for each input that sees its prompt and itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from softprompt.engine.forest.visibility import Owner, Span, Visibility, padded
from softprompt.engine.rows import EngineRow


@dataclass(frozen=True, slots=True)
class Targets:
    """The tokens to predict.

    Attributes:
        predictors: Stream index of the token before each target token, ``[M]``.
        labels: The target tokens, ``[M]``.
        row_index: The row each belongs to, ``[M]``.
    """

    predictors: Tensor
    labels: Tensor
    row_index: Tensor

    @classmethod
    def none(cls) -> Targets:
        """Return no targets."""
        nothing = torch.empty(0, dtype=torch.long)
        return cls(nothing, nothing, nothing)

    def distinct(self) -> tuple[Tensor, Tensor]:
        """Return each predicting token once ``[K]``, and which of them predicts each target ``[M]``."""
        wanted, predictor = torch.unique(self.predictors, return_inverse=True)
        return wanted, predictor


@dataclass(frozen=True, slots=True)
class Plan:
    """A stream of tokens to run.

    Attributes:
        ids: Token ids, from V on virtual, ``[N]``.
        positions: Position of each token in its own row, ``[N]``.
        kinds: Who sees whom: bundles of queries with their keys, kinds of unlike shape apart.
        targets: What is predicted.
        tree: For a forest, where each token stands in depth-first order and where its descendants
            end, ``[2, N]``.
    """

    ids: Tensor
    positions: Tensor
    kinds: tuple[tuple[Span, ...], ...]
    targets: Targets = field(default_factory=Targets.none)
    tree: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def visibility(self) -> Visibility:
        """Return who sees whom within the stream."""
        return replace(padded(self.kinds, self.positions, self.positions), tree=self.tree)

    def visibility_over(self, other: Plan, owned: Mapping[Owner, Tensor]) -> Visibility:
        """Return who sees which token of another stream (cross-attention).

        Args:
            other: The other stream.
            owned: Tokens of the other stream that each owner's tokens see.
        """
        spans = [
            Span(span.queries, owned[span.owner], _all(len(span.queries), len(owned[span.owner])))
            for kind in self.kinds
            for span in kind
        ]
        return padded([spans], self.positions, other.positions)


def _all(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class EncoderPlan:
    """An encoder's pass, and what its sequences mean to a decoder.

    Attributes:
        plan: The pass.
        owners: The input that each row of the batch has; rows with one input and prompt share it.
        owned: Tokens of the stream whose states each input owns, in the order of its sequence.
    """

    plan: Plan
    owners: tuple[int, ...]
    owned: Mapping[Owner, Tensor]


def encoder_plan(
    rows: Sequence[EngineRow], virtual: Sequence[tuple[int, ...]], *, sees_input: bool
) -> EncoderPlan:
    """Plan the encoder's pass for a batch.

    Args:
        rows: The rows; prompts that do not see the input stand in front of it.
        virtual: The virtual ids of each row's prompt.
        sees_input: Whether the prompts see the input.
    """
    inputs = [row.source_with(ids) for row, ids in zip(rows, virtual, strict=True)]
    prompt_of = dict(zip(inputs, virtual, strict=True))
    number = {ids: i for i, ids in enumerate(prompt_of)}
    owners = tuple(number[ids] for ids in inputs)
    if sees_input:
        own = _indices(list(prompt_of))
        plan = _encoder_pass([(0, ids) for ids in prompt_of], own, own)
        return EncoderPlan(plan, owners, dict(enumerate(own)))
    shared = [ids for ids in dict.fromkeys(virtual) if ids]
    sequences = [
        *((0, ids) for ids in shared),
        *((len(prompt), ids[len(prompt) :]) for ids, prompt in prompt_of.items()),
    ]
    own = _indices([ids for _, ids in sequences])
    states = dict(zip(shared, own, strict=False))
    seen = [
        torch.cat([states[prompt], index]) if prompt else index
        for prompt, index in zip(prompt_of.values(), own[len(shared) :], strict=True)
    ]
    plan = _encoder_pass(sequences, own, [*own[: len(shared)], *seen])
    return EncoderPlan(plan, owners, dict(enumerate(seen)))


def _encoder_pass(
    sequences: Sequence[tuple[int, tuple[int, ...]]], own: Sequence[Tensor], seen: Sequence[Tensor]
) -> Plan:
    """Return the pass of sequences with first positions, each seeing all of the given tokens."""
    spans = [
        Span(queries, keys, _all(len(queries), len(keys)))
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
