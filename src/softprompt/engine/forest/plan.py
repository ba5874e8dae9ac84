"""The plan of one pass: its tokens, each computed once, what is predicted, and who sees whom.

Causal rows and decoder rows (``causal_plan.py``) and encoder rows (``engines.py``) are all run from such a plan;
they differ in how it is made. Who sees whom is a few padded blocks instead of one N x N mask. A block is a bundle
of queries with the keys they may see: all roots form one, the groups of similar length another. Its size is G x Tq
x Tk, so a batch of many rows stays linear in rows. On a GPU a forest is run by FlexAttention instead: its kernel
computes for each tile whether a query sees a key, from two numbers a token, and nothing is gathered or padded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from softprompt.prompts import Prompt

MaskRule = Callable[[int, int, Tensor, Tensor], Tensor]
"""transformers' mask function: (batch, head, query index, key index) -> bool."""

Owner = Prompt | int | None
"""What rows share with each other alone: the prompt before them, or the encoder's input that they see."""

_FILL = 0.6
"""Groups at least this share of the longest are padded to it together; shorter ones get a block of their own."""


@dataclass(frozen=True, slots=True)
class Block:
    """Queries and keys of one attention call.

    Attributes:
        queries: Stream index of each query, 0 where padded, ``[G, Tq]``.
        keys: Stream index of each key, 0 where padded, ``[G, Tk]``.
        sees: Which query sees which key, bool ``[G, Tq, Tk]``; every padded query sees the first key.
    """

    queries: Tensor
    keys: Tensor
    sees: Tensor


@dataclass(frozen=True, slots=True)
class Visibility:
    """The blocks of a stream.

    Attributes:
        blocks: The blocks; together their queries hold every token of the stream once.
        where: Index of each token in the concatenated padded queries, ``[N]``.
        query_positions: Position of each query token in its own row, ``[N]``.
        key_positions: Position of each key token in its own row.
        tree: For a forest, the stretch of the depth-first order below each token, ``[2, N]``: token k
            is seen by token q when ``tree[0, k] <= tree[0, q] < tree[1, k]``.
        rule: The restriction that was applied, for kernels that evaluate it themselves.
    """

    blocks: tuple[Block, ...]
    where: Tensor
    query_positions: Tensor
    key_positions: Tensor
    tree: Tensor | None = None
    rule: MaskRule | None = None

    def restricted(self, rule: MaskRule) -> Visibility:
        """Return the same visibility, further restricted by an architecture's own rule.

        The rule (causal, sliding window, chunks) is evaluated at positions in the row, which is
        what its indices mean when a row is alone.
        """
        blocks = []
        for block in self.blocks:
            queries = self.query_positions[block.queries].unsqueeze(2)  # [G, Tq, 1]
            keys = self.key_positions[block.keys].unsqueeze(1)  # [G, 1, Tk]
            allowed = rule(0, 0, queries, keys)
            sees = block.sees & allowed
            # A padded query must see something, or its softmax is NaN.
            blind = ~sees.any(2, keepdim=True)
            first = torch.zeros_like(sees)
            first[..., 0] = True
            blocks.append(Block(block.queries, block.keys, sees | (blind & first)))
        return replace(self, blocks=tuple(blocks), rule=rule)

    def to(self, device: torch.device) -> Visibility:
        """Return the same visibility on a device."""
        return replace(
            self,
            blocks=tuple(Block(b.queries.to(device), b.keys.to(device), b.sees.to(device)) for b in self.blocks),
            where=self.where.to(device),
            query_positions=self.query_positions.to(device),
            key_positions=self.key_positions.to(device),
            tree=None if self.tree is None else self.tree.to(device),
        )

    def flex(self) -> BlockMask | None:
        """Return FlexAttention's mask, None for a visibility that is no tree."""
        if self.tree is None:
            return None
        enter, leave = self.tree
        positions, rule = self.query_positions, self.rule

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            below = (enter[key] <= enter[query]) & (enter[query] < leave[key])
            if rule is not None:
                below = below & rule(0, 0, positions[query], positions[key])
            return cast(Tensor, below)

        tokens = int(positions.shape[0])
        device = str(positions.device)
        return create_block_mask(sees, B=None, H=None, Q_LEN=tokens, KV_LEN=tokens, device=device)


@dataclass(frozen=True, slots=True)
class Span:
    """One bundle of queries before it is padded: stream indices and who sees whom.

    Attributes:
        queries: Stream indices ``[q]``.
        keys: Stream indices ``[k]``.
        sees: bool ``[q, k]``.
        owner: What the queries belong to: a prompt, or an input of the encoder; None for nothing.
    """

    queries: Tensor
    keys: Tensor
    sees: Tensor
    owner: Owner = None

    @classmethod
    def seeing_all(cls, queries: Tensor, keys: Tensor) -> Span:
        """Let every one of the queries see all of the keys."""
        return cls(queries, keys, torch.ones(len(queries), len(keys), dtype=torch.bool))


def padded(kinds: Sequence[Sequence[Span]], query_positions: Tensor, key_positions: Tensor) -> Visibility:
    """Pad spans into blocks: kinds apart, and within a kind those of similar length together."""
    blocks: list[Block] = []
    where = torch.zeros(len(query_positions), dtype=torch.long)
    offset = 0
    for spans in kinds:
        for bundle in _bundles([span for span in spans if len(span.queries)]):
            tallest = max(len(span.queries) for span in bundle)
            widest = max(len(span.keys) for span in bundle)
            queries = torch.zeros(len(bundle), tallest, dtype=torch.long)
            keys = torch.zeros(len(bundle), widest, dtype=torch.long)
            sees = torch.zeros(len(bundle), tallest, widest, dtype=torch.bool)
            sees[..., 0] = True
            for i, span in enumerate(bundle):
                q, k = len(span.queries), len(span.keys)
                queries[i, :q], keys[i, :k], sees[i, :q, :k] = span.queries, span.keys, span.sees
                sees[i, :q, k:] = False
                where[span.queries] = offset + i * tallest + torch.arange(q)
            offset += len(bundle) * tallest
            blocks.append(Block(queries, keys, sees))
    return Visibility(tuple(blocks), where, query_positions, key_positions)


def _bundles(spans: Sequence[Span]) -> list[list[Span]]:
    """Split spans into runs of similar query length, longest first."""
    ordered = sorted(spans, key=lambda span: -len(span.queries))
    cuts = [0]
    for i, span in enumerate(ordered):
        if len(span.queries) < _FILL * len(ordered[cuts[-1]].queries):
            cuts.append(i)
    return [ordered[a:b] for a, b in pairwise([*cuts, len(ordered)]) if a < b]


def whole_rows(lengths: Sequence[int]) -> Visibility:
    """Return the visibility of packed rows in which every token sees its whole row."""
    at, spans = 0, []
    for length in lengths:
        index = torch.arange(at, at + length)
        spans.append(Span.seeing_all(index, index))
        at += length
    positions = torch.cat([torch.arange(length) for length in lengths])
    return padded([spans], positions, positions)


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
        tree: For a forest, where each token stands in depth-first order and where its descendants end, ``[2, N]``.
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
        spans = [Span.seeing_all(span.queries, owned[span.owner]) for kind in self.kinds for span in kind]
        return padded([spans], self.positions, other.positions)
