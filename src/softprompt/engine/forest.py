"""The plan of one pass: a forest of tokens, each computed once.

    root     prompt rows, then the tokens with which all of its rows begin
    ├─ row   the rest of one source
    │  ├─ a candidate answer, sharing its first tokens with the others
    │  └─ …
    └─ row   …

In a causal model nothing that follows changes what stands before, so every token of a forest
has the hidden state it would have in its own padded row. Rows with the same prompt and source
share everything up to where their targets part. The last token of a target is never fed:
nothing is predicted from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from softprompt.engine.rows import EngineRow

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
        """Return each token's place in depth-first order, and the place where its descendants end."""
        n = len(self.tokens)
        sizes = [1] * n
        for token in reversed(range(n)):
            if self.parents[token] != _ROOT:
                sizes[self.parents[token]] += sizes[token]
        places, following = [0] * n, 0
        inside = [0] * n  # next free place below each token
        for token, parent in enumerate(self.parents):
            if parent == _ROOT:
                places[token], following = following, following + sizes[token]
            else:
                places[token], inside[parent] = inside[parent], inside[parent] + sizes[token]
            inside[token] = places[token] + 1
        return places, [place + size for place, size in zip(places, sizes, strict=True)]

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
class Root:
    """A prompt and the tokens that all of its rows begin with.

    Attributes:
        prompt: Index into the prompts of the call, -1 for none.
        virtual: Rows of the prompt.
        tokens: The shared beginning.
    """

    prompt: int
    virtual: int
    tokens: tuple[int, ...]

    def __len__(self) -> int:
        return self.virtual + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Forest:
    """Roots, groups below them, and the tokens whose successors are scored.

    The stream of a pass holds the roots in order, then the groups in order.

    Attributes:
        roots: The roots.
        groups: The groups.
        predictors: Stream index of the token before each target token, ``[M]``.
        labels: The target tokens, ``[M]``.
        row_index: The row each belongs to, ``[M]``.
    """

    roots: tuple[Root, ...]
    groups: tuple[Group, ...]
    predictors: Tensor
    labels: Tensor
    row_index: Tensor

    @classmethod
    def of(cls, rows: Sequence[EngineRow], virtual: Sequence[int]) -> Forest:
        """Plan a batch; ``virtual[p]`` is the length of prompt p."""
        roots, root_of = _roots(rows, virtual)
        groups: list[Group] = []
        found: dict[
            tuple[int, tuple[int, ...]], tuple[int, int]
        ] = {}  # -> group, end of the source
        scored: list[tuple[int, int, int, int, int]] = []  # root, group, token in it, label, row
        for number, row in enumerate(rows):
            root = root_of[row.prompt]
            key = (row.prompt, row.source)
            if key not in found:
                group = Group(root)
                end = _ROOT
                for token in row.source[len(roots[root].tokens) :]:
                    end = group.child(end, token)
                found[key] = (len(groups), end)
                groups.append(group)
            index, at = found[key]
            for i, token in enumerate(row.target):
                scored.append((root, index, at, token, number))
                if i + 1 < len(row.target):
                    at = groups[index].child(at, token)
        return cls(tuple(roots), tuple(groups), *_scored_tensors(roots, groups, scored))

    @property
    def starts(self) -> tuple[list[int], list[int]]:
        """Stream index of the first token of each root, and of each group."""
        return _starts(self.roots, self.groups)

    def __len__(self) -> int:
        return sum(map(len, self.roots)) + sum(len(group.tokens) for group in self.groups)

    def ids(self, vocabulary: int, offsets: Sequence[int]) -> Tensor:
        """Return the ids of the stream ``[N]``; prompt p's rows are from ``vocabulary + offsets[p]`` on."""
        ids: list[int] = []
        for root in self.roots:
            first = vocabulary + (offsets[root.prompt] if root.prompt >= 0 else 0)
            ids += [*range(first, first + root.virtual), *root.tokens]
        for group in self.groups:
            ids += group.tokens
        return torch.tensor(ids, dtype=torch.long)

    def positions(self) -> Tensor:
        """Return the position of each token in its own row, ``[N]``."""
        positions: list[int] = []
        for root in self.roots:
            positions += range(len(root))
        for group in self.groups:
            first = len(self.roots[group.root])
            positions += [first + depth for depth in group.depths]
        return torch.tensor(positions, dtype=torch.long)

    def tree(self) -> Tensor:
        """Return, in depth-first order, where each token stands and where its descendants end, ``[2, N]``."""
        enter, leave, at = [0] * len(self), [0] * len(self), 0
        root_starts, group_starts = self.starts
        for number, (root, start) in enumerate(zip(self.roots, root_starts, strict=True)):
            for token in range(start, start + len(root)):
                enter[token], at = at, at + 1
            for group, first in zip(self.groups, group_starts, strict=True):
                if group.root == number:
                    for token, (place, end) in enumerate(zip(*group.depth_first(), strict=True)):
                        enter[first + token], leave[first + token] = at + place, at + end
                    at += len(group.tokens)
            for token in range(start, start + len(root)):
                leave[token] = at
        return torch.tensor([enter, leave])


def _roots(rows: Sequence[EngineRow], virtual: Sequence[int]) -> tuple[list[Root], dict[int, int]]:
    sources: dict[int, list[tuple[int, ...]]] = {}
    for row in rows:
        sources.setdefault(row.prompt, []).append(row.source)
    roots = [
        Root(prompt, virtual[prompt] if prompt >= 0 else 0, _common_prefix(own))
        for prompt, own in sources.items()
    ]
    return roots, {root.prompt: i for i, root in enumerate(roots)}


def _common_prefix(sources: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the tokens all sources begin with."""
    first, last = min(sources), max(sources)  # in order, these two differ first
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return first[:shared]


def _starts(roots: Sequence[Root], groups: Sequence[Group]) -> tuple[list[int], list[int]]:
    at, root_starts, group_starts = 0, [], []
    for root in roots:
        root_starts.append(at)
        at += len(root)
    for group in groups:
        group_starts.append(at)
        at += len(group.tokens)
    return root_starts, group_starts


def _scored_tensors(
    roots: Sequence[Root], groups: Sequence[Group], scored: Sequence[tuple[int, int, int, int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    root_starts, group_starts = _starts(roots, groups)
    predictors, labels, numbers = [], [], []
    for root, group, token, label, row in scored:
        end_of_root = root_starts[root] + len(roots[root]) - 1
        predictors.append(end_of_root if token == _ROOT else group_starts[group] + token)
        labels.append(label)
        numbers.append(row)
    return (
        torch.tensor(predictors, dtype=torch.long),
        torch.tensor(labels, dtype=torch.long),
        torch.tensor(numbers, dtype=torch.long),
    )
