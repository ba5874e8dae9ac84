from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt.errors import DataError
from softprompt.training.sampling import plan_batches, split_batch

LENGTHS = st.lists(st.integers(0, 60), max_size=200)


def padded(batches, lengths):
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


@given(LENGTHS, st.integers(1, 20), st.integers(0, 9), st.integers(0, 3))
def test_every_index_exactly_once_in_batches_of_the_size(lengths, size, seed, epoch):
    batches = plan_batches(lengths, size, seed=seed, epoch=epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= size for batch in batches)
    assert len(batches) == -(-len(lengths) // size)


@given(LENGTHS, st.integers(60, 200))
def test_parts_of_a_batch_are_bounded_and_make_it_up(lengths, most):
    batch = list(range(len(lengths)))
    parts = split_batch(batch, lengths, most)
    assert [i for part in parts for i in part] == batch
    assert all(part and padded([part], lengths) <= most for part in parts)


def test_seed_and_epoch_decide_everything():
    lengths = [n % 17 for n in range(100)]
    plan = plan_batches(lengths, 8, seed=1, epoch=2)
    random.seed(5)
    assert plan == plan_batches(lengths, 8, seed=1, epoch=2)
    assert plan != plan_batches(lengths, 8, seed=1, epoch=3)
    assert plan != plan_batches(lengths, 8, seed=2, epoch=2)


def test_a_plan_is_the_same_on_every_machine():
    plan = plan_batches([3, 1, 4, 1, 5, 9, 2, 6], 2, seed=73, epoch=0)
    assert plan == [[6, 2], [3, 1], [4, 5], [0, 7]]


def test_planning_leaves_the_global_generator_alone():
    state = random.getstate()
    plan_batches([1, 2, 3], 2, seed=1, epoch=0)
    assert random.getstate() == state


def test_padding_is_small_and_batches_still_vary():
    generator = random.Random(0)
    lengths = [min(200, int(generator.lognormvariate(3, 0.7)) + 1) for _ in range(2000)]
    plain = list(range(2000))
    unsorted = [plain[start : start + 8] for start in range(0, 2000, 8)]
    plans = [plan_batches(lengths, 8, seed=0, epoch=epoch) for epoch in range(2)]
    assert padded(unsorted, lengths) > 1.7 * sum(lengths)
    assert all(padded(plan, lengths) < 1.15 * sum(lengths) for plan in plans)
    together = [{frozenset(batch) for batch in plan} for plan in plans]
    assert len(together[0] & together[1]) < 5


def test_batches_of_a_small_data_set_vary_too():
    lengths = list(range(50))
    plans = [plan_batches(lengths, 8, seed=0, epoch=epoch) for epoch in range(2)]
    together = [{frozenset(batch) for batch in plan} for plan in plans]
    assert not together[0] & together[1]


def test_batch_order_is_not_by_length():
    lengths = list(range(512))
    means = [sum(batch) / len(batch) for batch in plan_batches(lengths, 8, seed=0, epoch=0)]
    rises = sum(b > a for a, b in itertools.pairwise(means))
    assert 16 < rises < 48


def test_a_row_above_the_bound_is_refused_with_the_numbers():
    with pytest.raises(DataError, match="record 2 has 40 tokens, more than max_tokens=32"):
        split_batch([0, 1], [3, 40], 32)
