"""The prompts whose keys and values are kept between requests, by content."""

from __future__ import annotations

from collections import OrderedDict
from typing import final

from torch import Tensor

Key = tuple[str, tuple[int, ...]]
"""A prompt's content, and the tokens that stand before it."""


@final
class ResidentPrompts:
    """Keys and values ``[L, 2, A_kv, P, D]``, those not used for longest dropped first.

    Rows copy what they need, so dropping one changes no row that runs.

    Args:
        most: Prompts that are kept.
        most_tokens: Tokens that they have together.
    """

    def __init__(self, most: int, most_tokens: int) -> None:
        self._most = most
        self._most_tokens = most_tokens
        self._kept: OrderedDict[Key, Tensor] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def tokens(self) -> int:
        """Tokens that the kept prompts have together."""
        return sum(int(values.shape[3]) for values in self._kept.values())

    def find(self, key: Key) -> Tensor | None:
        """Return a prompt's keys and values, None when they must be computed."""
        values = self._kept.get(key)
        if values is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return values

    def keep(self, key: Key, values: Tensor) -> None:
        """Keep a prompt's keys and values, if there is room for them at all."""
        if self._most < 1 or int(values.shape[3]) > self._most_tokens:
            return
        self._kept[key] = values
        self._kept.move_to_end(key)
        while len(self._kept) > self._most or self.tokens > self._most_tokens:
            self._kept.popitem(last=False)
