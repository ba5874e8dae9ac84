"""Arithmetic of prompts against loops, and a map between tables that is known."""

from __future__ import annotations

import pytest
import torch

from softprompt.errors import ConfigError
from softprompt.prompts import Prompt, recycle, resized
from softprompt.prompts.composition import average, concatenation, difference, shifted


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


A, B, C = drawn(1, 4, 6), drawn(2, 4, 6), drawn(3, 4, 6)


@pytest.mark.parametrize("weights", [None, (1, 1, 1), (3, 0, 1), (0.2, 0.2, 0.6)])
def test_an_average_weighs_relative_to_the_sum(weights):
    used = weights or (1, 1, 1)
    expected = torch.empty(4, 6)
    for i in range(4):
        for j in range(6):
            parts = [w * float(p[i, j]) for w, p in zip(used, (A, B, C), strict=True)]
            expected[i, j] = sum(parts) / sum(used)
    torch.testing.assert_close(average([A, B, C], weights), expected)


def test_an_average_of_unlike_lengths_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"one length, got 4, 2 virtual tokens; .*resize"):
        average([A, B[:2]])


@pytest.mark.parametrize("weights", [(1, -1), (0, 0), (float("nan"), 1), (1,), (1, 2, 3)])
def test_weights_that_cannot_be_used(weights):
    with pytest.raises(ConfigError, match="weights"):
        average([A, B], weights)


def test_a_concatenation_is_one_prompt_after_the_other():
    joined = concatenation([A, B[:2], C])
    assert joined.shape == (10, 6)
    assert torch.equal(joined[:4], A)
    assert torch.equal(joined[4:6], B[:2])
    assert torch.equal(joined[6:], C)


def test_a_difference_added_to_what_was_subtracted_gives_the_prompt_back():
    torch.testing.assert_close(shifted(B, difference(A, B)), A)
    torch.testing.assert_close(shifted(C, difference(A, B), 0.5), C + (A - B) / 2)
    with pytest.raises(ConfigError, match=r"one shape, got \[4, 6\] and \[2, 6\]"):
        difference(A, B[:2])
    with pytest.raises(ConfigError, match="scale"):
        shifted(A, B, float("inf"))


def test_a_prompt_is_made_longer_by_its_rows_over_again_and_shorter_by_a_cut():
    assert torch.equal(resized(A, 2), A[:2])
    assert torch.equal(resized(A, 4), A)
    assert torch.equal(resized(A, 10), torch.cat([A, A, A[:2]]))
    with pytest.raises(ConfigError, match="at least 1"):
        resized(A, 0)


def test_prompts_of_two_parts_are_treated_part_by_part():
    two = torch.stack([A, B])
    assert torch.equal(resized(two, 2), torch.stack([A[:2], B[:2]]))
    joined = concatenation([two, two])
    assert torch.equal(joined, torch.stack([torch.cat([A, A]), torch.cat([B, B])]))


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"input": torch.ones(3)}, r"input of a prompt must be \[P, H\], got \[3\]"),
        ({"decoder": torch.ones(1, 2, 3)}, r"decoder of a prompt must be \[P, H\], got \[1, 2, 3\]"),
        ({"prefix": torch.ones(2, 3)}, r"prefix of a prompt must be \[L, 2, A_kv, P, D\], got \[2, 3\]"),
        (
            {"prefix": torch.ones(1, 2, 1, 3, 4), "input": torch.ones(3, 4)},
            "a prompt is a prefix or virtual tokens, not both; split it in two",
        ),
    ],
)
def test_what_is_no_prompt_is_refused(parts, told):
    with pytest.raises(ConfigError, match=told):
        Prompt(**parts)


def test_a_prompt_moves_with_all_its_parts():
    prompt = Prompt(torch.ones(2, 3), torch.ones(1, 3))
    assert prompt.to(torch.device("cpu")) is prompt
    moved = prompt.to(torch.device("meta"))
    assert [tuple(part.shape) for part in moved.tensors] == [(2, 3), (1, 3)]
    assert all(part.is_meta for part in moved.tensors)


def test_widths_must_agree():
    with pytest.raises(ConfigError, match="6, 5 wide"):
        concatenation([A, drawn(4, 4, 5)])
    with pytest.raises(ConfigError, match="at least one"):
        average([])


def test_recycling_finds_a_linear_map_to_another_width():
    table, linear = drawn(5, 40, 6), drawn(6, 6, 9)
    found = recycle(A, table, table @ linear)
    torch.testing.assert_close(found.embeddings, A @ linear, rtol=1e-4, atol=1e-5)
    assert found.error < 1e-6
    assert found.tokens == 36


def test_recycling_says_how_far_off_it_is():
    table, linear, noise = drawn(5, 400, 6), drawn(6, 6, 9), drawn(7, 400, 9)
    targets = table @ linear + noise
    error = recycle(A, table, targets).error
    rest = torch.arange(400) % 10 != 0
    solution = torch.linalg.pinv(table[rest].double()) @ targets[rest].double()
    missed = table[~rest].double() @ solution - targets[~rest]
    assert error == pytest.approx(float(missed.norm() / targets[~rest].double().norm()), rel=1e-6)
    unrelated = recycle(A, table, drawn(8, 400, 9)).error
    assert 0.2 < error < 0.6
    assert unrelated > 0.9


def test_recycling_copes_with_tables_of_less_than_full_rank():
    table = drawn(5, 40, 6)
    table[:, 5] = table[:, 4]
    prompt = A.clone()
    prompt[:, 5] = prompt[:, 4]
    torch.testing.assert_close(recycle(prompt, table, 2 * table).embeddings, 2 * prompt)


def test_recycling_needs_enough_tokens_and_matching_tables():
    with pytest.raises(ConfigError, match="of the 6 that the two bases share, too few"):
        recycle(A, drawn(5, 6, 6), drawn(6, 6, 9))
    with pytest.raises(ConfigError, match="same tokens"):
        recycle(A, drawn(5, 40, 6), drawn(6, 39, 9))
    with pytest.raises(ConfigError, match="same tokens"):
        recycle(A, drawn(5, 40, 7), drawn(6, 40, 9))
