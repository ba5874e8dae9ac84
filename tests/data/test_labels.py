from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt.data import label_set
from softprompt.errors import ConfigError, DataError


def test_few_repeated_short_targets_are_labels():
    assert label_set(["spam", "ham", "ham", "spam"], task=None) == ("ham", "spam")


@given(st.lists(st.sampled_from(["a", "b", "c"])), st.randoms())
def test_order_of_the_rows_does_not_matter(targets, generator):
    shuffled = list(targets)
    generator.shuffle(shuffled)
    assert label_set(targets, task=None) == label_set(shuffled, task=None)


@pytest.mark.parametrize(
    "targets",
    [
        [],
        ["one"] * 50,
        ["a", "b", "b"],  # 1.5 rows per target
        [f"label {n}" for n in range(101)] * 3,
        ["short", "x" * 65] * 9,
        ["one", "two\nlines"] * 9,
    ],
)
def test_other_targets_are_text(targets):
    assert label_set(targets, task=None) is None


def test_the_limits_themselves_are_labels():
    targets = [f"{n:064d}" for n in range(100)] * 2
    random.Random(0).shuffle(targets)
    assert len(label_set(targets, task=None)) == 100


def test_the_task_decides():
    assert label_set(["a", "b"], task="classification") == ("a", "b")
    assert label_set(["a", "b"] * 9, task="generation") is None
    assert label_set([f"{n}" for n in range(500)], task="classification") is not None


def test_classification_needs_two_labels():
    with pytest.raises(DataError, match="at least 2 distinct targets, got 1: 'a'"):
        label_set(["a", "a"], task="classification")


def test_an_unknown_task_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'classification'"):
        label_set(["a"], task="clasification")
