"""Causal rows as a forest of tokens, each computed once.

    root     what all rows of one owner begin with: their prompt, a common beginning of the input
    ├─ row   the rest of one input
    │  ├─ a candidate answer, sharing its first tokens with the others
    │  └─ …
    └─ row   …

In a causal model nothing that follows changes what stands before, so every token of a forest has the hidden state
it would have in its own padded row. Rows are ids, a prompt's from V on, so a ``Prompt`` object is shared by what
stands before it and no further: by all rows when it is in front of them, by the answers of one input when it stands
behind it. The last token of a target is never fed: nothing is predicted from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from softprompt.engine import EngineRow
from softprompt.engine.forest.plan import Owner, Plan, Span, Targets

_ROOT = -1
"""Parent of a group's first tokens."""


@dataclass(slots=True)
class Group:
    """The tokens below one root that belong to one source: a chain, then a trie of targets.

    Attributes:
        root: Index of the root above it.
        tokens: Token ids, parents before children.
        parents: Index of each token's parent within the group, -1 for the root.
        depths: Tokens between each token and the root.
    """

    root: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def child(self, parent: int, token: int) -> int:
        """Return the index of a token below a parent, added if it is new."""
        key = (parent, token)
        if key not in self._children:
            self._children[key] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(0 if parent == _ROOT else self.depths[parent] + 1)
        return self._children[key]

    @property
    def is_chain(self) -> bool:
        """Whether every token follows the one before it."""
        return all(parent == i - 1 for i, parent in enumerate(self.parents))

    def depth_first(self) -> tuple[list[int], list[int]]:
        """Return each token's index in depth-first order, and the index where its descendants end."""
        n = len(self.tokens)
        sizes = [1] * n
        for token in reversed(range(n)):
            if self.parents[token] != _ROOT:
                sizes[self.parents[token]] += sizes[token]
        order, following = [0] * n, 0
        inside = [0] * n  # next free index below each token
        for token, parent in enumerate(self.parents):
            if parent == _ROOT:
                order[token], following = following, following + sizes[token]
            else:
                order[token], inside[parent] = inside[parent], inside[parent] + sizes[token]
            inside[token] = order[token] + 1
        return order, [index + size for index, size in zip(order, sizes, strict=True)]

    def sees(self) -> Tensor:
        """Return which token sees which, itself and its ancestors, bool ``[n, n]``."""
        n = len(self.tokens)
        if self.is_chain:
            return torch.ones(n, n, dtype=torch.bool).tril()
        sees = torch.eye(n, dtype=torch.bool)
        for i, parent in enumerate(self.parents):
            if parent != _ROOT:
                sees[i] |= sees[parent]
        return sees


@dataclass(frozen=True, slots=True)
class Path:
    """What one row feeds, and what it predicts.

    Attributes:
        owner: Rows of different owners share nothing: the prompt, or the encoder's input they see.
        ids: The ids before its target, virtual ones among them.
        target: The target tokens.
        offset: Positions taken before the first id; the same for all rows of an owner.
        unscored: Indices of target tokens that are read and not scored.
    """

    owner: Owner
    ids: tuple[int, ...]
    target: tuple[int, ...]
    offset: int = 0
    unscored: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Root:
    """What all rows of an owner begin with; nothing where the owner has one input only.

    Attributes:
        owner: The owner.
        tokens: The shared beginning.
        offset: Position of its first token, behind keys and values that are not in the stream.
    """

    owner: Owner
    tokens: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Forest:
    """Roots, and groups below them. The stream holds the roots in order, then the groups in order.

    Attributes:
        roots: The roots.
        groups: The groups.
        scored: Group, token in it, label and row of each target token.
    """

    roots: tuple[Root, ...]
    groups: tuple[Group, ...]
    scored: tuple[tuple[int, int, int, int], ...]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Forest:
        """Plan rows."""
        roots = _roots(paths)
        root_of = {root.owner: number for number, root in enumerate(roots)}
        groups: list[Group] = []
        found: dict[tuple[Owner, tuple[int, ...]], tuple[int, int]] = {}  # -> group, end of the input
        scored: list[tuple[int, int, int, int]] = []
        for row, path in enumerate(paths):
            root = root_of[path.owner]
            key = (path.owner, path.ids)
            if key not in found:
                group = Group(root)
                end = _ROOT
                for token in path.ids[len(roots[root].tokens) :]:
                    end = group.child(end, token)
                found[key] = (len(groups), end)
                groups.append(group)
            number, at = found[key]
            for i, token in enumerate(path.target):
                if i not in path.unscored:
                    scored.append((number, at, token, row))
                if i + 1 < len(path.target):
                    at = groups[number].child(at, token)
        return cls(tuple(roots), tuple(groups), tuple(scored))

    @property
    def _parts(self) -> list[Sequence[int]]:
        return [*(root.tokens for root in self.roots), *(group.tokens for group in self.groups)]

    @property
    def starts(self) -> tuple[list[int], list[int]]:
        """Stream index of the first token of each root, and of each group."""
        at, starts = 0, []
        for tokens in self._parts:
            starts.append(at)
            at += len(tokens)
        return starts[: len(self.roots)], starts[len(self.roots) :]

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def plan(self) -> Plan:
        """Return the stream to run."""
        ids = [token for tokens in self._parts for token in tokens]
        return Plan(
            torch.tensor(ids, dtype=torch.long),
            torch.tensor(list(self._positions()), dtype=torch.long),
            self._spans(),
            self._targets(),
            self.tree(),
        )

    def _positions(self) -> Iterator[int]:
        for root in self.roots:
            yield from range(root.offset, root.offset + len(root.tokens))
        for group in self.groups:
            root = self.roots[group.root]
            first = root.offset + len(root.tokens)
            yield from (first + depth for depth in group.depths)

    def _spans(self) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        root_starts, group_starts = self.starts
        roots, groups = [], []
        for root, start in zip(self.roots, root_starts, strict=True):
            index = torch.arange(start, start + len(root.tokens))
            sees = torch.ones(len(index), len(index), dtype=torch.bool).tril()
            roots.append(Span(index, index, sees, root.owner))
        for group, start in zip(self.groups, group_starts, strict=True):
            own = torch.arange(start, start + len(group.tokens))
            above = roots[group.root].keys
            sees = torch.cat([torch.ones(len(own), len(above), dtype=torch.bool), group.sees()], dim=1)
            groups.append(Span(own, torch.cat([above, own]), sees, roots[group.root].owner))
        return tuple(roots), tuple(groups)

    def _targets(self) -> Targets:
        root_starts, group_starts = self.starts
        predictors = []
        for number, token, _, _ in self.scored:
            root = self.groups[number].root
            end_of_root = root_starts[root] + len(self.roots[root].tokens) - 1
            predictors.append(end_of_root if token == _ROOT else group_starts[number] + token)
        return Targets(
            torch.tensor(predictors, dtype=torch.long),
            torch.tensor([label for _, _, label, _ in self.scored], dtype=torch.long),
            torch.tensor([row for _, _, _, row in self.scored], dtype=torch.long),
        )

    def tree(self) -> Tensor:
        """Return, in depth-first order, where each token stands and where its descendants end, ``[2, N]``."""
        enter, leave, at = [0] * len(self), [0] * len(self), 0
        root_starts, group_starts = self.starts
        for number, (root, start) in enumerate(zip(self.roots, root_starts, strict=True)):
            for token in range(start, start + len(root.tokens)):
                enter[token], at = at, at + 1
            for group, first in zip(self.groups, group_starts, strict=True):
                if group.root == number:
                    for token, (index, end) in enumerate(zip(*group.depth_first(), strict=True)):
                        enter[first + token], leave[first + token] = at + index, at + end
                    at += len(group.tokens)
            for token in range(start, start + len(root.tokens)):
                leave[token] = at
        return torch.tensor([enter, leave])


def causal_forest(rows: Sequence[EngineRow], virtual: Sequence[tuple[int, ...]]) -> Forest:
    """Plan rows of a causal model; keys and values take positions but no tokens.

    Args:
        rows: The rows.
        virtual: The virtual ids of each row's prompt.
    """
    return Forest.of(
        [
            Path(row.prompt, row.source_with(ids), row.target, row.prefix_positions, row.unscored)
            for row, ids in zip(rows, virtual, strict=True)
        ]
    )


def decoder_forest(
    rows: Sequence[EngineRow], virtual: Sequence[tuple[int, ...]], owners: Sequence[int], starts: Sequence[int]
) -> Forest:
    """Plan the decoder's rows ``[virtual tokens | start | target]`` of a seq2seq model.

    Args:
        rows: The rows.
        virtual: The virtual ids before each row's start.
        owners: The encoder's input that each of them sees.
        starts: The token that each of them starts with.
    """
    return Forest.of(
        [
            Path(owner, (*ids, start), row.target)
            for row, ids, owner, start in zip(rows, virtual, owners, starts, strict=True)
        ]
    )


def _roots(paths: Sequence[Path]) -> list[Root]:
    inputs: dict[Owner, set[tuple[int, ...]]] = {}
    offsets: dict[Owner, int] = {}
    for path in paths:
        inputs.setdefault(path.owner, set()).add(path.ids)
        offsets[path.owner] = path.offset
    return [
        # One input needs no root: with its answers it is one bundle of queries instead of two.
        Root(owner, _common_prefix(own) if len(own) > 1 else (), offsets[owner])
        for owner, own in inputs.items()
    ]


def _common_prefix(inputs: set[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the tokens all inputs begin with."""
    first, last = min(inputs), max(inputs)  # in order, these two differ first
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return first[:shared]
