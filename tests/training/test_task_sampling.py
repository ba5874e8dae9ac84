"""Which rows make which update."""

from collections import Counter

import pytest

from softprompt.training.sampling import Sampling

TASKS = [0] * 60 + [1] * 20 + [2] * 4


def sampling(tasks=TASKS, **options):
    defaults = {"lengths": [3] * len(tasks), "batch_size": 6, "accumulate_steps": 2, "seed": 1}
    return Sampling(tasks=tasks, **(defaults | options))


def drawn(sampler, epochs=1):
    return [
        [sampler.tasks[i] for i in batch]
        for epoch in range(epochs)
        for update in sampler.updates(epoch)
        for batch in update
    ]


def test_one_data_set_gives_each_row_once_an_epoch():
    rows = [i for update in sampling().updates(3) for batch in update for i in batch]
    assert sorted(rows) == list(range(len(TASKS)))


@pytest.mark.parametrize("mixed", ["proportional", "uniform"])
def test_mixed_batches_follow_from_seed_and_epoch(mixed):
    assert sampling(mixed=mixed).updates(2) == sampling(mixed=mixed).updates(2)
    assert sampling(mixed=mixed).updates(2) != sampling(mixed=mixed).updates(3)
    assert sampling(mixed=mixed).updates(2) != sampling(mixed=mixed, seed=2).updates(2)
    assert len(drawn(sampling(mixed=mixed))) == 14  # 84 rows in batches of 6


@pytest.mark.parametrize("mixed", ["proportional", "uniform"])
def test_every_batch_holds_a_random_number_of_tasks_from_two_on(mixed):
    batches = drawn(sampling(mixed=mixed), epochs=10)
    assert {len(batch) for batch in batches} == {6}
    counts = Counter(len(set(batch)) for batch in batches)
    assert set(counts) == {2, 3}
    assert min(counts.values()) > 0.35 * len(batches)


def test_tasks_are_drawn_in_proportion_or_alike():
    shares = {}
    for mixed in ("proportional", "uniform"):
        found = Counter(task for batch in drawn(sampling(mixed=mixed), 60) for task in batch)
        shares[mixed] = [found[task] / found.total() for task in range(3)]
    assert shares["uniform"] == pytest.approx([1 / 3] * 3, abs=0.03)
    first, second, third = shares["proportional"]
    assert first > 2 * second > 2 * third


def test_a_task_is_gone_through_before_a_row_comes_again():
    for task, count in ((0, 60), (1, 20), (2, 4)):
        rows = [
            i
            for update in sampling(mixed="uniform").updates(0)
            for batch in update
            for i in batch
            if TASKS[i] == task
        ]
        whole = rows[: len(rows) // count * count] if len(rows) >= count else rows
        seen = Counter(whole)
        assert max(seen.values()) - min(seen.values()) == 0 if len(rows) >= count else True
        assert len(set(rows[:count])) == len(rows[:count])


def test_a_batch_of_one_row_holds_one_task():
    assert {len(batch) for batch in drawn(sampling(mixed="uniform", batch_size=1))} == {1}


def test_a_token_budget_splits_mixed_batches_too():
    whole, split = sampling(mixed="uniform"), sampling(mixed="uniform", max_tokens=7)
    for one, other in zip(whole.updates(0), split.updates(0), strict=True):
        assert [i for batch in one for i in batch] == [i for batch in other for i in batch]
        assert all(len(batch) <= 2 for batch in other)


@pytest.mark.parametrize("mixed", [None, "proportional", "uniform"])
@pytest.mark.parametrize("size", [1, 3, 4, 5, 100])
@pytest.mark.parametrize("accumulated", [1, 2, 3])
def test_the_updates_of_an_epoch_are_counted_without_planning_it(mixed, size, accumulated):
    planned = sampling(mixed=mixed, batch_size=size, accumulate_steps=accumulated)
    for epoch in range(3):
        assert len(planned.updates(epoch)) == planned.updates_per_epoch
    alone = sampling(tasks=[0] * 7, lengths=[3, 9, 4, 4, 8, 2, 6], mixed=None, batch_size=size, max_tokens=9)
    assert len(alone.updates(0)) == alone.updates_per_epoch
