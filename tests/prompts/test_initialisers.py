"""First rows of a prompt."""

from __future__ import annotations

import pytest
import torch

from softprompt.errors import ConfigError
from softprompt.prompts import initialisers

V, H = 11, 4
TABLE = torch.arange(V * H, dtype=torch.float32).reshape(V, H)


def embed(ids):
    return TABLE[ids]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_short_text_is_tiled():
    assert torch.equal(initialisers.from_tokens(5, [3, 7], embed), TABLE[[3, 7, 3, 7, 3]])


def test_a_long_text_is_cut_from_the_right():
    assert torch.equal(initialisers.from_tokens(2, [3, 7, 9], embed), TABLE[[3, 7]])


def test_a_text_of_the_right_length_is_kept():
    assert torch.equal(initialisers.from_tokens(3, [3, 7, 9], embed), TABLE[[3, 7, 9]])


def test_an_empty_text_is_refused():
    with pytest.raises(ConfigError, match="has no tokens"):
        initialisers.from_tokens(3, [], embed)


def test_a_label_is_the_mean_of_its_tokens():
    rows = initialisers.from_labels(4, [[1], [2, 5]], V, embed, generator=seeded())
    assert torch.equal(rows[0], TABLE[1])
    assert torch.equal(rows[1], (TABLE[2] + TABLE[5]) / 2)
    assert torch.equal(rows[2:], initialisers.sampled(2, V, embed, generator=seeded()))


def test_labels_may_fill_the_prompt():
    rows = initialisers.from_labels(2, [[1], [2]], V, embed, generator=seeded())
    assert torch.equal(rows, TABLE[[1, 2]])


def test_too_many_or_empty_labels_are_refused():
    with pytest.raises(ConfigError, match="each of the 3 labels, num_virtual_tokens is 2"):
        initialisers.from_labels(2, [[1], [2], [3]], V, embed, generator=None)
    with pytest.raises(ConfigError, match="a label without tokens"):
        initialisers.from_labels(4, [[1], []], V, embed, generator=None)


def test_sampled_rows_are_rows_of_the_table():
    rows = initialisers.sampled(50, V, embed, generator=seeded())
    assert rows.shape == (50, H)
    assert {tuple(row.tolist()) for row in rows} == {tuple(row.tolist()) for row in TABLE}


def test_normal_rows_have_the_scale_asked_for():
    rows = initialisers.normal(200, 64, std=0.3, generator=seeded())
    assert rows.std().item() == pytest.approx(0.3, rel=0.03)
    assert rows.mean().item() == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: initialisers.normal(6, H, std=1.0, generator=g),
        lambda g: initialisers.sampled(6, V, embed, generator=g),
        lambda g: initialisers.from_labels(6, [[1]], V, embed, generator=g),
    ],
    ids=["normal", "sampled", "labels"],
)
def test_the_generator_decides_and_the_global_one_is_left_alone(draw):
    torch.manual_seed(7)
    expected = torch.randn(1)
    torch.manual_seed(7)
    first, again, other = draw(seeded(1)), draw(seeded(1)), draw(seeded(2))
    assert torch.equal(torch.randn(1), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rms_of_a_small_table_is_exact():
    assert initialisers.rms(embed, V) == pytest.approx(TABLE.square().mean().sqrt().item())


def test_rms_of_a_large_table_is_sampled():
    table = torch.randn(50_000, 8, generator=seeded()) * 0.02
    assert initialisers.rms(lambda ids: table[ids], 50_000) == pytest.approx(0.02, rel=0.02)


def test_rows_are_float32_copies_without_history():
    table = torch.nn.Embedding(V, H, dtype=torch.bfloat16)
    rows = initialisers.from_tokens(2, [3, 4], table)
    assert rows.dtype is torch.float32
    assert not rows.requires_grad
    rows.zero_()
    assert table.weight[3].abs().sum() > 0
