"""Slow, obvious references: one row at a time, embeddings concatenated by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oracles.rows import RowCase
from softprompt.backbone import input_embedding


def solo_logits(model: PreTrainedModel, prompt: Tensor | None, ids: Tensor) -> Tensor:
    """Return logits ``[T, V]`` of one unpadded row ``[T]`` behind a prompt ``[P, H]``."""
    embeds = input_embedding(model)(ids.unsqueeze(0))
    if prompt is None:
        return model(inputs_embeds=embeds).logits[0]
    rows = prompt.to(embeds.dtype).unsqueeze(0)
    return model(inputs_embeds=torch.cat([rows, embeds], dim=1)).logits[0, prompt.shape[0] :]


def row_logits(model: PreTrainedModel, row: RowCase, prompts: list[Tensor]) -> Tensor:
    """Return the logits ``[n, V]`` that predict a row's target, its prompts placed by hand."""
    table = input_embedding(model)
    source = with_prompt(table, row.source, row.at, prompts[row.prompt] if row.prompt >= 0 else None)
    if not model.config.is_encoder_decoder:
        whole = torch.cat([source, table(torch.tensor([row.target]))], dim=1)
        return model(inputs_embeds=whole).logits[0, -len(row.target) - 1 : -1]
    encoded = model.get_encoder()(inputs_embeds=source)
    start = model.prepare_decoder_input_ids_from_labels(labels=torch.tensor([row.target]))
    own = prompts[row.decoder] if row.decoder >= 0 else None
    table = model.get_decoder().get_input_embeddings()
    inputs = with_prompt(table, tuple(start[0].tolist()), 0, own)
    logits: Tensor = model(encoder_outputs=encoded, decoder_inputs_embeds=inputs).logits
    return logits[0, -len(row.target) :]


def with_prompt(table: Any, ids: tuple[int, ...], at: int, prompt: Tensor | None) -> Tensor:
    """Return embeddings ``[1, W, H]`` of ids with a prompt behind the first ``at`` of them."""
    embeds = table(torch.tensor([ids], dtype=torch.long))
    if prompt is None:
        return embeds
    rows = prompt.to(embeds.dtype).unsqueeze(0)
    return torch.cat([embeds[:, :at], rows, embeds[:, at:]], dim=1)


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
