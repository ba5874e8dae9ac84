"""Which rows make which update: a function of (seed, epoch), so that nothing random is kept.

One data set is shuffled and cut, each row once in an epoch. Several are mixed: each batch draws how many tasks
stand in it, which, and then its rows (Wang et al. 2023, stochastic task sampling).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from softprompt.errors import DataError

Update = list[list[int]]
"""Micro-batches of row numbers whose gradients make one update."""
BATCHES_PER_BUCKET = 16


@dataclass(frozen=True, slots=True)
class Sampling:
    """How rows are drawn.

    Attributes:
        lengths: Tokens of each row.
        tasks: The task of each row, from 0; rows of a task stand together.
        batch_size: Rows in a batch.
        accumulate_steps: Batches in an update.
        seed: With the epoch the only source of randomness.
        max_tokens: Padded tokens of a pass at most; None is no limit.
        mixed: None goes through all rows; ``proportional`` and ``uniform`` draw mixed batches.
    """

    lengths: Sequence[int]
    tasks: Sequence[int]
    batch_size: int
    accumulate_steps: int
    seed: int
    max_tokens: int | None = None
    mixed: str | None = None

    @property
    def updates_per_epoch(self) -> int:
        """Updates of every epoch, known without planning one; a budget of tokens splits passes, not updates."""
        batches = -(-len(self.tasks) // self.batch_size)
        return -(-batches // self.accumulate_steps)

    def updates(self, epoch: int) -> list[Update]:
        """Return the updates of an epoch, counted from 0."""
        if self.mixed is None:
            batches = plan_batches(self.lengths, self.batch_size, seed=self.seed, epoch=epoch)
        else:
            batches = self._mixed_batches(epoch)
        size = self.accumulate_steps
        updates = [batches[start : start + size] for start in range(0, len(batches), size)]
        if self.max_tokens is None:
            return updates
        # The budget splits passes, never updates: memory changes, the optimiser does not notice.
        budget = self.max_tokens
        return [
            [part for batch in update for part in split_batch(batch, self.lengths, budget)] for update in updates
        ]

    def _mixed_batches(self, epoch: int) -> list[list[int]]:
        """Return as many batches as the rows fill; a task runs through its rows in a random order.

        A task whose rows are used up starts again in another order, so a small one is repeated.
        """
        generator = random.Random(f"mixed_batches {self.seed} {epoch}")
        rows: dict[int, list[int]] = {}
        for index, task in enumerate(self.tasks):
            rows.setdefault(task, []).append(index)
        weights = {task: 1.0 if self.mixed == "uniform" else len(own) for task, own in rows.items()}
        waiting: dict[int, list[int]] = {task: [] for task in rows}
        batches = []
        for _ in range(-(-len(self.tasks) // self.batch_size)):
            batch = []
            for task in _tasks_of_batch(generator, weights, self.batch_size):
                if not waiting[task]:
                    waiting[task] = generator.sample(rows[task], len(rows[task]))
                batch.append(waiting[task].pop())
            batches.append(batch)
        return batches


def _tasks_of_batch(generator: random.Random, weights: dict[int, float], batch_size: int) -> list[int]:
    """Draw the task of each row of a batch: at least two tasks, each of them at least once."""
    most = min(len(weights), batch_size)
    count = generator.randint(min(2, most), most)
    left, chosen = dict(weights), []
    for _ in range(count):
        task = generator.choices(list(left), list(left.values()))[0]
        del left[task]
        chosen.append(task)
    rest = generator.choices(chosen, [weights[task] for task in chosen], k=batch_size - count)
    return chosen + rest


def plan_batches(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Return batches of row indices, each index exactly once: rows of similar length together, all else random.

    Rows are shuffled, cut into buckets of a few batches, sorted by length inside each bucket, cut
    into batches, and the batches are shuffled. Small buckets keep batches random from epoch to epoch,
    large ones save padding; 16 batches save nearly all of it.

    Args:
        lengths: Tokens of each row.
        batch_size: Most rows in a batch.
        seed: With ``epoch``, the only source of randomness.
        epoch: Changes the plan from epoch to epoch.
    """
    order = list(range(len(lengths)))
    # A text seed is hashed with SHA-512, the same in every process and Python version.
    generator = random.Random(f"plan_batches {seed} {epoch}")
    generator.shuffle(order)
    # At least two buckets, or a small data set would be sorted the same way in every epoch.
    width = batch_size * max(1, min(BATCHES_PER_BUCKET, -(-len(order) // batch_size) // 2))
    batches: list[list[int]] = []
    for start in range(0, len(order), width):
        bucket = sorted(order[start : start + width], key=lambda index: lengths[index])
        batches += [bucket[first : first + batch_size] for first in range(0, len(bucket), batch_size)]
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
