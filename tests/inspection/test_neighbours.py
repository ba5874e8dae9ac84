from __future__ import annotations

import pytest
import torch

from softprompt.inspection import summary


@pytest.mark.parametrize("chunk", [2, 3, 100])
def test_nearest_tokens_against_all_cosines(monkeypatch, letters, chunk):
    monkeypatch.setattr(summary, "_CHUNK", chunk)
    prompt, table = torch.randn(4, 6), torch.randn(9, 6)
    cosines = torch.nn.functional.cosine_similarity(prompt[:, None], table[None], dim=-1)
    expected = cosines.topk(3, dim=1)
    found = summary.nearest_tokens(prompt, table, letters(9))
    assert [[near.token_id for near in row] for row in found] == expected.indices.tolist()
    values = torch.tensor([[near.cosine for near in row] for row in found])
    torch.testing.assert_close(values, expected.values)


def test_nearest_tokens_skip_padding_and_name_partial_characters(letters):
    table = torch.eye(5)
    found = summary.nearest_tokens(table[[1, 4]], table, letters(4), count=1)
    assert (found[0][0].token_id, found[0][0].token) == (1, "<byte 1>")
    assert found[1][0].token_id < 4


def test_a_vocabulary_smaller_than_asked_is_listed_whole(letters):
    assert len(summary.nearest_tokens(torch.eye(2), torch.eye(2), letters(2))[0]) == 2
