"""Both measures against loops over rows."""

from __future__ import annotations

import math

import pytest
import torch

from softprompt.errors import ConfigError
from softprompt.prompts import MEASURES, similarity


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


A, B = drawn(1, 4, 6), drawn(2, 3, 6)


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def test_the_mean_rows_are_compared():
    means = [[sum(column) / len(column) for column in p.T.tolist()] for p in (A, B)]
    assert similarity(A, B) == pytest.approx(cosine(*means))


def test_all_pairs_of_rows_are_compared():
    pairs = [cosine(a, b) for a in A.tolist() for b in B.tolist()]
    assert similarity(A, B, "pairs") == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_similarity_is_symmetric_and_knows_no_order_of_rows_and_no_scale(measure):
    value = similarity(A, B, measure)
    assert similarity(B, A, measure) == pytest.approx(value)
    assert similarity(A.flip(0), 3 * B, measure) == pytest.approx(value)
    assert similarity(A, torch.zeros(2, 6), measure) == 0
    assert -1 <= value <= 1


def test_a_prompt_is_most_like_itself_by_its_mean():
    assert similarity(A, A) == pytest.approx(1)
    assert similarity(A[:1], A[:1], "pairs") == pytest.approx(1)


def test_what_cannot_be_compared():
    with pytest.raises(ConfigError, match=r"one base .* 6 and 5 wide"):
        similarity(A, drawn(3, 4, 5))
    with pytest.raises(ConfigError, match=r"mean, pairs, got 'pair' \(did you mean 'pairs'"):
        similarity(A, B, "pair")
