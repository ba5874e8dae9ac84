"""Sequences packed into one row see the prompt and themselves."""

from __future__ import annotations

import torch

from softprompt.engine import is_packed, packed_mask


def test_restarting_positions_mean_packed_rows():
    assert is_packed(torch.tensor([[0, 1, 2], [0, 1, 0]]))
    assert is_packed(torch.tensor([[0, 0]]))
    assert not is_packed(torch.tensor([[0, 1, 2], [4, 5, 9]]))
    assert not is_packed(torch.tensor([[3]]))


def test_the_mask_against_a_loop():
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]])
    segments = [[1, 1, 2, 2, 2], [1, 1, 1, 1, 2]]
    prompt = 2
    mask = packed_mask(positions, prompt, torch.float32)
    assert mask.shape == (2, 1, 7, 7)
    for b, segment in enumerate(segments):
        whole = [0] * prompt + segment
        for query in range(7):
            for key in range(7):
                seen = key <= query and (whole[key] == 0 or whole[key] == whole[query])
                expected = 0.0 if seen else torch.finfo(torch.float32).min
                assert mask[b, 0, query, key].item() == expected


def test_the_mask_has_the_dtype_asked_for():
    mask = packed_mask(torch.tensor([[0, 0]]), 1, torch.bfloat16)
    assert mask.dtype is torch.bfloat16
    assert mask.isfinite().all()
