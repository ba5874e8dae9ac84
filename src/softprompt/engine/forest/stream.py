"""Several sequences packed into one row, told apart by restarting positions."""

from __future__ import annotations

import torch
from torch import Tensor


def is_packed(position_ids: Tensor) -> bool:
    """Tell whether positions ``[B, T]`` start again inside a row."""
    return bool((position_ids[:, 1:] <= position_ids[:, :-1]).any())


def packed_mask(position_ids: Tensor, prompt: int, dtype: torch.dtype) -> Tensor:
    """Return an additive mask ``[B, 1, P + T, P + T]`` for packed rows behind one prompt.

    Each token sees the whole prompt and its own sequence so far, never a neighbour.
    """
    batch, total = position_ids.shape
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    segment = starts.long().cumsum(1)  # [B, T]
    segment = torch.cat([segment.new_zeros(batch, prompt), segment], dim=1)  # [B, P + T]
    same = segment.unsqueeze(2) == segment.unsqueeze(1)
    to_prompt = (segment == 0).unsqueeze(1)
    causal = torch.ones(
        prompt + total, prompt + total, dtype=torch.bool, device=segment.device
    ).tril()
    allowed = (same | to_prompt) & causal
    mask = torch.zeros(allowed.shape, dtype=dtype, device=segment.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)
