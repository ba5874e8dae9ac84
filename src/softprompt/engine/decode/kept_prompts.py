"""LRU cache of prompt keys and values, by the prompts' content, and what reads it in front of inputs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import final

from torch import Tensor

from softprompt.backbone import Base
from softprompt.engine import DecodeForest, Engine, EngineRow, ForestEngine, NewTokens, check_rows, why_undecodable
from softprompt.prompts import Prompt

Key = tuple[str, tuple[int, ...]]
"""The hash of a prompt's content, and the tokens that stand before it."""


@final
class ResidentPrompts:
    """LRU cache of keys and values ``[L, 2, A_kv, P, D]``.

    Rows copy what they need or hold on to it, so dropping one changes no row that runs. Any thread may call.

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
        """Return whether there is room for a prompt of so many tokens at all."""
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


def reads_front(row: EngineRow) -> bool:
    """Return whether a row may have its prompt as keys and values in front of it.

    Behind none of its own tokens nothing would predict its target.
    """
    return row.at == 0 and bool(row.source)


@final
class FrontPrompts:
    """Prefix caching for scores: virtual tokens ``[P, H]`` become keys and values, where that changes no score.

    Args:
        base: The base.
        residents: Where keys and values are kept; the batcher of the same model may share them.
    """

    def __init__(self, base: Base, residents: ResidentPrompts) -> None:
        self._base = base
        self._residents = residents
        self._made: DecodeForest | None = None

    def in_front(self, rows: Sequence[EngineRow], engine: Engine) -> list[EngineRow]:
        """Return the rows, those that may with keys and values instead of their prompt's virtual tokens.

        Args:
            rows: The rows.
            engine: What will score them.

        Raises:
            SoftPromptError: The rows cannot be run behind their prompt.
        """
        grouped: dict[Prompt, list[EngineRow]] = {}
        for row in rows:
            if row.prompt is not None:
                grouped.setdefault(row.prompt, []).append(row)
        kept = {prompt: self._found(prompt, own, engine) for prompt, own in grouped.items()}
        found = []
        for row in rows:
            prefix = None if row.prompt is None else kept[row.prompt]
            found.append(replace(row, prompt=prefix) if prefix and reads_front(row) else row)
        return found

    def _found(self, prompt: Prompt, rows: Sequence[EngineRow], engine: Engine) -> Prompt | None:
        """Return a prompt as its keys and values, None where its virtual tokens must be run."""
        if prompt.input is None or prompt.decoder is not None:
            return None
        if not prompt.tokens or not self._residents.may_keep(prompt.tokens):
            return None
        if not (prompt.sees_input and any(map(reads_front, rows)) and self._takes(engine)):
            return None
        key = (prompt.key, ())
        kept = self._residents.find(key)
        if kept is None:
            # The pass below would run into positions that the model does not have.
            check_rows(self._base, rows)
            kept = self._computed(prompt.input)
            self._residents.keep(key, kept)
        return Prompt(prefix=kept)

    def _takes(self, engine: Engine) -> bool:
        """Return whether keys and values are computed, and read, exactly; probed once per base."""
        return (
            isinstance(engine, ForestEngine) and not why_undecodable(self._base) and engine.reads_keys_and_values()
        )

    def _computed(self, tokens: Tensor) -> Tensor:
        forest = self._forest()
        first = forest.vocabulary
        lanes = forest.store.take(len(tokens))
        assert lanes is not None, "it is empty, and holds whatever may be kept"
        (lane,) = lanes
        lane.tainted = True
        try:
            ids = tuple(range(first, first + len(tokens)))
            forest.step([NewTokens(lane, ids, tokens.detach(), "none")])
            return forest.store.read(lane, len(tokens))
        finally:
            forest.store.release(lane)

    def _forest(self) -> DecodeForest:
        if self._made is None:
            limit = self._base.facts.context_length
            most = self._residents.most_tokens
            self._made = DecodeForest(
                self._base, most if limit is None else min(most, limit), ordered_weights=False
            )
        return self._made
