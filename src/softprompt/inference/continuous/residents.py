"""The prompts whose keys and values are kept between requests, by content."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import final

from torch import Tensor

Key = tuple[str, tuple[int, ...]]
"""A prompt's content, and the tokens that stand before it."""


@final
class ResidentPrompts:
    """Keys and values ``[L, 2, A_kv, P, D]``, those not used for longest dropped first.

    Rows copy what they need or hold on to it, so dropping one changes no row that runs. Any thread may
    call.

    Attributes:
        most_tokens: Tokens that they may have together.

    Args:
        most: Prompts that are kept.
        most_tokens: Tokens that they have together.
    """

    def __init__(self, most: int, most_tokens: int) -> None:
        self._most = most
        self.most_tokens = most_tokens
        self._kept: OrderedDict[Key, Tensor] = OrderedDict()
        self.hits = 0
        self.misses = 0
        self._guard = threading.RLock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def tokens(self) -> int:
        """Tokens that the kept prompts have together."""
        with self._guard:
            return sum(int(values.shape[3]) for values in self._kept.values())

    def may_keep(self, tokens: int) -> bool:
        """Tell whether there is room for a prompt of so many tokens at all."""
        return self._most > 0 and tokens <= self.most_tokens

    def find(self, key: Key) -> Tensor | None:
        """Return a prompt's keys and values, None when they must be computed."""
        with self._guard:
            values = self._kept.get(key)
            if values is None:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return values

    def keep(self, key: Key, values: Tensor) -> None:
        """Keep a prompt's keys and values, if there is room for them at all."""
        if not self.may_keep(int(values.shape[3])):
            return
        with self._guard:
            self._kept[key] = values
            self._kept.move_to_end(key)
            while len(self._kept) > self._most or self.tokens > self.most_tokens:
                self._kept.popitem(last=False)
