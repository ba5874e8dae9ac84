"""Slow, obvious references behind keys and values: one row, a cache filled by hand."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from oracles.caches import CACHE
from softprompt.backbone import Base


def random_prefix(model: PreTrainedModel, length: int, seed: int = 0) -> Tensor:
    """Return keys and values ``[L, 2, A_kv, P, D]``."""
    shape = Base.of(model).key_value_shape
    generator = torch.Generator().manual_seed(seed)
    size = (shape.layers, 2, shape.heads, length, shape.width)
    return torch.randn(*size, generator=generator) * 0.7


def filled(prefix: Tensor) -> DynamicCache:
    """Return a cache of one row that holds a prefix."""
    cache = DynamicCache()
    for index, layer in enumerate(prefix):
        cache.update(layer[:1], layer[1:], index)
    return cache


def solo_logits_behind(model: PreTrainedModel, prefix: Tensor | None, ids: list[int]) -> Tensor:
    """Return logits ``[T, V]`` of one unpadded row behind a prefix; None is none."""
    row = torch.tensor([ids])
    if prefix is None:
        return model(input_ids=row).logits[0]
    length = prefix.shape[3]
    inputs = {
        "input_ids": row,
        CACHE: filled(prefix),
        "attention_mask": torch.ones(1, length + len(ids), dtype=torch.long),
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(length, length + len(ids)).unsqueeze(0)
    return model(**inputs).logits[0]


def solo_greedy_behind(model: PreTrainedModel, prefix: Tensor | None, ids: list[int], new: int) -> list[int]:
    """Return ``new`` greedy tokens after one row, every step from the beginning."""
    row = list(ids)
    for _ in range(new):
        row.append(int(solo_logits_behind(model, prefix, row)[-1].argmax()))
    return row[len(ids) :]


def solo_decoder_logits(
    model: PreTrainedModel, prefix: Tensor | None, ids: list[int], decoder_ids: list[int]
) -> Tensor:
    """Return logits ``[T, V]`` of one row of a seq2seq model, a prefix in its decoder."""
    inputs = {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([decoder_ids])}
    if prefix is not None:
        inputs[CACHE] = EncoderDecoderCache(filled(prefix), DynamicCache())
    return model(**inputs).logits[0]
