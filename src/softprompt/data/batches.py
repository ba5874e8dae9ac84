"""Batch planning: rows of similar length together, random in everything else.

Rows are shuffled, cut into buckets of a few batches, sorted by length inside each bucket, cut
into batches, and the batches are shuffled. Small buckets keep batches random from epoch to epoch,
large ones save padding; 16 batches save nearly all of it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from softprompt.errors import ConfigError, DataError

BATCHES_PER_BUCKET = 16


def plan_batches(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int, shuffle: bool = True
) -> list[list[int]]:
    """Return batches of row indices, each index exactly once.

    Args:
        lengths: Tokens of each row.
        batch_size: Most rows in a batch.
        seed: With ``epoch``, the only source of randomness.
        epoch: Changes the plan from epoch to epoch.
        shuffle: False gives the rows from longest to shortest, the same for every seed.

    Raises:
        ConfigError: ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise ConfigError(f"expected a batch_size of at least 1, got {batch_size}")
    order = list(range(len(lengths)))
    if not shuffle:
        order.sort(key=lambda index: -lengths[index])
        return _cut(order, batch_size)
    # A text seed is hashed with SHA-512, the same in every process and Python version.
    generator = random.Random(f"plan_batches {seed} {epoch}")
    generator.shuffle(order)
    width = _bucket_width(len(order), batch_size)
    batches: list[list[int]] = []
    for start in range(0, len(order), width):
        bucket = sorted(order[start : start + width], key=lambda index: lengths[index])
        batches += _cut(bucket, batch_size)
    generator.shuffle(batches)
    return batches


def split_batch(batch: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split a batch into micro-batches of bounded padded size, whose gradients are accumulated.

    Args:
        batch: Row indices.
        lengths: Tokens of each row, by index.
        max_tokens: Most tokens in a padded part, that is rows x longest row.

    Raises:
        DataError: A row alone is longer than ``max_tokens``.
    """
    parts: list[list[int]] = []
    longest = 0
    for index in batch:
        if lengths[index] > max_tokens:
            raise DataError(
                f"record {index + 1} has {lengths[index]} tokens, more than max_tokens={max_tokens} for a "
                "whole pass; raise it or lower max_source_length"
            )
        longest = max(longest, lengths[index])
        if not parts or (len(parts[-1]) + 1) * longest > max_tokens:
            parts.append([])
            longest = lengths[index]
        parts[-1].append(index)
    return parts


def _bucket_width(rows: int, batch_size: int) -> int:
    batches = -(-rows // batch_size)
    # At least two buckets, or a small data set would be sorted the same way in every epoch.
    return batch_size * max(1, min(BATCHES_PER_BUCKET, batches // 2))


def _cut(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[start : start + size]) for start in range(0, len(order), size)]
