"""One pass over the new tokens of many rows, each behind what it holds already.

Rows join and leave between passes. A row's tokens are run once, as many at a time as the caller likes: its prompt,
its input in parts, then one token a step. No padding is run, and logits are made only where they are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from softprompt.backbone import Base, frozen_linears
from softprompt.engine import Drawn, EngineRow, PlainEngine, difference, measured, remembered
from softprompt.engine.decode.decode_attention import NAME, active, decode_plan
from softprompt.engine.decode.lanes import KeyValueStore, Lane
from softprompt.engine.forest import require_packable
from softprompt.errors import BackboneError
from softprompt.prompts import Prompt

Wanted = Literal["none", "last", "all"]

_LENGTHS = (6, 11, 3, 8)
"""Tokens of each probe row: behind virtual tokens, none, keys and values, and virtual tokens again."""


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What one row adds in a pass.

    Attributes:
        lane: The row's lane.
        ids: Its new tokens; V + n is virtual token n of its own prompt.
        prompt: The prompt's virtual tokens ``[P, H]``, where ids need them.
        wanted: After which of the tokens logits are wanted.
    """

    lane: Lane
    ids: tuple[int, ...]
    prompt: Tensor | None = None
    wanted: Wanted = "last"


@final
class DecodeForest:
    """Runs the new tokens of rows over a store of lanes.

    Attributes:
        store: The lanes.
        vocabulary: Where the ids of virtual tokens begin (V).

    Args:
        base: The base.
        max_tokens: What the lanes hold together.
        ordered_weights: Keep a copy of the weights for faster products (``FrozenLinear``).

    Raises:
        BackboneError: If the model cannot be run so.
    """

    def __init__(self, base: Base, max_tokens: int, *, ordered_weights: bool = True) -> None:
        self._base = base
        facts = base.facts
        require_packable(base)
        limit = facts.rope_changes_at
        if limit is not None and limit < (facts.context_length or limit + 1):
            raise BackboneError(f"{facts.architecture} changes its positions when a row gets long")
        self.vocabulary = facts.vocabulary
        like = torch.empty(0, dtype=base.dtype, device=base.device)
        self.store = KeyValueStore(base.key_value_shape, like, max_tokens)
        base.require_attention(NAME)
        self._device = base.device
        self._products = frozen_linears(base.model, keep=ordered_weights)

    def step(self, news: Sequence[NewTokens]) -> list[Tensor]:
        """Run the new tokens of rows, and return each row's wanted logits, float32 ``[k, V]``.

        The caller holds no lock; the pass holds the model's.
        """
        plan, order = decode_plan(self.store, [(new.lane, len(new.ids)) for new in news], self._device)
        ids, positions, wanted, counts = self._stream([news[i] for i in order])
        tables = [own for i in order if (own := self._virtual(news[i])) is not None]
        virtual = torch.cat(tables).to(self._device) if tables else None
        running = self._base.running(attention=NAME, virtual_tokens=virtual, products=self._products)
        token = active.set(plan)
        try:
            with running, torch.no_grad():
                logits = self._forward(ids, positions, wanted)
        finally:
            active.reset(token)
        for new in news:
            new.lane.length += len(new.ids)
        return self._parted(logits, counts, order)

    def _virtual(self, new: NewTokens) -> Tensor | None:
        """Return a row's virtual tokens where its ids need them."""
        return new.prompt if new.prompt is not None and max(new.ids) >= self.vocabulary else None

    def _stream(self, news: Sequence[NewTokens]) -> tuple[list[int], list[int], list[int], list[int]]:
        """Return ids, positions, indices of wanted logits, and how many of those each row wants."""
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        counts: list[int] = []
        offset = 0  # virtual tokens of the prompts before this one in the table
        for new in news:
            own = new.ids
            virtual = self._virtual(new)
            if virtual is not None:
                own = tuple(i + offset if i >= self.vocabulary else i for i in own)
                offset += int(virtual.shape[0])
            count = {"none": 0, "last": 1, "all": len(own)}[new.wanted]
            end = len(ids) + len(own)
            wanted += range(end - count, end)
            counts.append(count)
            ids += own
            positions += range(new.lane.length, new.lane.length + len(own))
        return ids, positions, wanted, counts

    def _forward(self, ids: list[int], positions: list[int], wanted: list[int]) -> Tensor:
        inputs = {
            "input_ids": torch.tensor([ids], device=self._device),
            "position_ids": torch.tensor([positions], device=self._device),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long, device=self._device),
            # One position at least, because an empty choice means all of them to some models.
            "logits_to_keep": torch.tensor(wanted or [0], device=self._device),
            "use_cache": False,
        }
        logits: Tensor = self._base.model(**inputs).logits
        return logits[0].float()

    def _parted(self, logits: Tensor, counts: list[int], order: list[int]) -> list[Tensor]:
        parts = torch.split(logits[: sum(counts)], counts)
        found: list[Tensor] = [logits] * len(order)
        for i, part in zip(order, parts, strict=True):
            found[i] = part
        return found


def why_undecodable(base: Base) -> str:
    """Return why the decode forest does not serve a base, empty where it does; found by a probe, once.

    Rows of unlike lengths, behind prompts of both kinds and behind none, join at different passes, are read in
    parts, and one leaves in between; their log-probabilities must be those of each row alone on the plain path.
    """
    return remembered(base, "decoding", lambda: _decoding_difference(base), otherwise="no decode forest")


@torch.no_grad()
def _decoding_difference(base: Base) -> str:
    forest, plain = DecodeForest(base, 4096, ordered_weights=False), PlainEngine(base)
    drawn = Drawn(base)
    virtual, prefix = drawn.virtual_tokens(4), drawn.keys_and_values(3)
    prompts = (Prompt(virtual), None, Prompt(prefix=prefix), Prompt(virtual.flip(0)))
    rows = []
    for length, prompt in zip(_LENGTHS, prompts, strict=True):
        text = drawn.tokens(length, padding=True)
        rows.append(EngineRow(text[:1], text[1:], prompt))
    got = _decoded(forest, rows)
    expected, moved = measured(base, lambda: torch.cat([plain.target_log_probs([row]).values for row in rows]))
    return difference("log-probabilities", got, expected, moved)


def _decoded(forest: DecodeForest, rows: Sequence[EngineRow]) -> Tensor:
    """Return the log-probabilities of the rows' targets, read in parts."""
    store = forest.store
    (visitor,) = store.take(8) or []
    forest.step([NewTokens(visitor, (1, 2))])
    lanes: list[Lane] = []
    left: list[tuple[int, ...]] = []
    for row in rows:
        lanes += store.take(len(row.source) + len(row.target) + 8) or []
        if row.prompt is not None and row.prompt.prefix is not None:
            store.fill(lanes[-1], store.converted(row.prompt.prefix))
        virtual = range(forest.vocabulary, forest.vocabulary + row.input_tokens)
        left.append((*virtual, *row.source, *row.target))
    logits: list[list[Tensor]] = [[] for _ in rows]
    passed = 0
    while any(left):
        if passed == 2:
            store.release(visitor)
        # Row i joins at pass i, and reads i + 1 tokens at a time.
        running = [i for i in range(min(len(rows), passed + 1)) if left[i]]
        news = []
        for i in running:
            ids, left[i] = left[i][: i + 1], left[i][i + 1 :]
            prompt = rows[i].prompt
            news.append(NewTokens(lanes[i], ids, None if prompt is None else prompt.input, "all"))
        for i, part in zip(running, forest.step(news), strict=True):
            logits[i].append(part)
        passed += 1
    found = []
    for row, parts in zip(rows, logits, strict=True):
        logs = torch.cat(parts)[-len(row.target) - 1 : -1].log_softmax(-1)
        labels = torch.tensor(row.target, device=logs.device).unsqueeze(1)
        found.append(logs.gather(1, labels)[:, 0])
    return torch.cat(found)
