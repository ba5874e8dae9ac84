"""Slow, obvious references: one row at a time, embeddings concatenated by hand."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.backbone.facts import input_embedding


def solo_logits(model: PreTrainedModel, prompt: Tensor | None, ids: Tensor) -> Tensor:
    """Return logits ``[T, V]`` of one unpadded row ``[T]`` behind a prompt ``[P, H]``."""
    embeds = input_embedding(model)(ids.unsqueeze(0))
    if prompt is None:
        return model(inputs_embeds=embeds).logits[0]
    rows = prompt.to(embeds.dtype).unsqueeze(0)
    return model(inputs_embeds=torch.cat([rows, embeds], dim=1)).logits[0, prompt.shape[0] :]


def solo_greedy(model: PreTrainedModel, prompt: Tensor | None, ids: Tensor, new: int) -> list[int]:
    """Return ``new`` greedy tokens after one row, without any cache."""
    row = ids
    for _ in range(new):
        row = torch.cat([row, solo_logits(model, prompt, row)[-1].argmax().reshape(1)])
    return row[ids.shape[0] :].tolist()


def padded(rows: list[list[int]], side: str, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids and mask ``[B, T]``."""
    total = max(len(r) for r in rows)
    ids, masks = [], []
    for row in rows:
        fill = total - len(row)
        ids.append([pad] * fill + row if side == "left" else row + [pad] * fill)
        masks.append([0] * fill + [1] * len(row) if side == "left" else [1] * len(row) + [0] * fill)
    return torch.tensor(ids), torch.tensor(masks)
