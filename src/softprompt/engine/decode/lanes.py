"""Where the keys and values of running rows are kept: lanes of equal capacity side by side.

Every running row has a lane, as long as the row can ever get, so that nothing moves and nothing must be thrown out
while it runs. Lanes of one capacity (a power of two) share a buffer and are kept dense in it, so a decode step
reads their keys in place, through a view. A row's prompt is copied into its lane once; reading it elsewhere would
cost a second attention call and a merge in every layer of every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from softprompt.backbone import KeyValueShape

_LEAST = 32
"""Smallest capacity of a lane, in tokens."""

_FIRST = 4
"""Lanes that a buffer has room for at first."""


@dataclass(slots=True, eq=False)
class Lane:
    """Where the keys and values of one row are kept.

    Attributes:
        capacity: Tokens it can hold.
        slot: Its index among the lanes of this capacity; changes when others leave.
        length: Tokens it holds.
        tainted: Whether it may hold values that are not finite.
    """

    capacity: int
    slot: int
    length: int = 0
    tainted: bool = False


@dataclass(slots=True)
class LaneGroup:
    """The lanes of one capacity, dense in one buffer.

    Attributes:
        values: Keys and values, ``[L, 2, slots, A_kv, capacity, D]``.
        lanes: The lanes by slot.
    """

    values: Tensor
    lanes: list[Lane] = field(default_factory=list)

    def resize(self, slots: int) -> None:
        """Make room for ``slots`` lanes, no fewer than there are."""
        layers, two, _, *rest = self.values.shape
        # Zeros, not garbage: a hidden key's weight is 0, and 0 times NaN is NaN.
        values = self.values.new_zeros(layers, two, slots, *rest)
        values[:, :, : len(self.lanes)] = self.values[:, :, : len(self.lanes)]
        self.values = values

    def keys_and_values(self, lane: Lane) -> Tensor:
        """Return a view of a lane's keys and values, ``[L, 2, A_kv, capacity, D]``."""
        return self.values[:, :, lane.slot]


@final
class KeyValueStore:
    """Lanes for rows, within a budget of tokens.

    Buffers are kept for the rows to come; those of other capacities shrink when room is needed.

    Args:
        shape: Sizes of the keys and values.
        like: A tensor of their dtype and device.
        max_tokens: Most tokens that all buffers together have room for.
    """

    def __init__(self, shape: KeyValueShape, like: Tensor, max_tokens: int) -> None:
        self._shape = shape
        self._like = like
        self._max_tokens = max_tokens
        self.groups: dict[int, LaneGroup] = {}

    @property
    def max_tokens(self) -> int:
        """Most tokens that there is room for."""
        return self._max_tokens

    @property
    def allocated(self) -> int:
        """Tokens that the buffers have room for."""
        return sum(capacity * group.values.shape[2] for capacity, group in self.groups.items())

    @property
    def held(self) -> int:
        """Tokens that running rows hold."""
        return sum(lane.length for group in self.groups.values() for lane in group.lanes)

    def capacity_for(self, tokens: int) -> int:
        """Return the capacity of a lane for a row of at most ``tokens``."""
        capacity = _LEAST
        while capacity < tokens:
            capacity *= 2
        return min(capacity, max(tokens, self._max_tokens))

    def fits(self, tokens: int, count: int = 1) -> bool:
        """Tell whether ``count`` rows of at most ``tokens`` fit when nothing else runs."""
        return self.capacity_for(tokens) * count <= self._max_tokens

    def take(self, tokens: int, count: int = 1) -> list[Lane] | None:
        """Return lanes for rows of at most ``tokens`` each, None when there is no room now."""
        capacity = self.capacity_for(tokens)
        if not self._make_room(capacity, count):
            return None
        group = self.groups[capacity]
        lanes = [Lane(capacity, len(group.lanes) + i) for i in range(count)]
        group.lanes += lanes
        return lanes

    def release(self, lane: Lane) -> None:
        """Give a lane back; the last lane of its capacity moves into its slot."""
        group = self.groups[lane.capacity]
        own = group.keys_and_values(lane)
        if lane.tainted:
            own.zero_()
        last = group.lanes.pop()
        if last is not lane:
            own[..., : last.length, :] = group.keys_and_values(last)[..., : last.length, :]
            if last.tainted:
                group.keys_and_values(last).zero_()
            last.slot = lane.slot
            group.lanes[lane.slot] = last

    def converted(self, values: Tensor) -> Tensor:
        """Return keys and values in the dtype and on the device of the lanes."""
        return values.detach().to(self._like.device, self._like.dtype)

    def fill(self, lane: Lane, values: Tensor) -> None:
        """Put keys and values ``[L, 2, A_kv, P, D]`` at the end of what a lane holds."""
        count = int(values.shape[3])
        own = self.groups[lane.capacity].keys_and_values(lane)
        own[..., lane.length : lane.length + count, :] = values
        lane.length += count

    def read(self, lane: Lane, count: int) -> Tensor:
        """Return a copy of the first ``count`` keys and values of a lane, ``[L, 2, A_kv, count, D]``."""
        return self.groups[lane.capacity].keys_and_values(lane)[..., :count, :].clone()

    def copy(self, source: Lane, targets: Sequence[Lane]) -> None:
        """Let lanes hold what another does."""
        for target in targets:
            self.fill(target, self.read(source, source.length))

    def _make_room(self, capacity: int, count: int) -> bool:
        group = self.groups.get(capacity)
        used = len(group.lanes) if group is not None else 0
        slots = int(group.values.shape[2]) if group is not None else 0
        if used + count <= slots:
            return True
        if self.allocated - slots * capacity + (used + count) * capacity > self._max_tokens:
            self._squeeze(capacity)
        elsewhere = self.allocated - slots * capacity
        most = (self._max_tokens - elsewhere) // capacity
        if used + count > most:
            return False
        if group is None:
            layers, heads, width = self._shape.layers, self._shape.heads, self._shape.width
            group = LaneGroup(self._like.new_zeros(layers, 2, 0, heads, capacity, width))
            self.groups[capacity] = group
        group.resize(min(most, max(used + count, 2 * used, _FIRST)))
        return True

    def _squeeze(self, capacity: int) -> None:
        """Give back what the lanes of other capacities do not use."""
        for other, group in list(self.groups.items()):
            if other != capacity and not group.lanes:
                del self.groups[other]
            elif other != capacity:
                group.resize(len(group.lanes))
