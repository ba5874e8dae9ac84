"""Keys and values of a base's layers: their shape, and those of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from softprompt.backbone.passes import evaluated
from softprompt.backbone.state import device_of, is_encoder_decoder, locked, state_of
from softprompt.errors import BackboneError, ConfigError, SoftPromptError


@dataclass(frozen=True, slots=True)
class KeyValueShape:
    """Sizes of the self-attention that a prefix stands in: L, A_kv and D."""

    layers: int
    heads: int
    width: int


def key_value_shape(model: PreTrainedModel) -> KeyValueShape:
    """Return the sizes of a model's keys and values, read from a cache once per model.

    Raises:
        BackboneError: If it keeps anything else for what it has read, or layers differ.
    """
    return state_of(model).once("keys and values", lambda: _shape(model))


def _shape(model: PreTrainedModel) -> KeyValueShape:
    try:
        layers, _, heads, _, width = key_values(model, [0]).shape
    except BackboneError:
        if model.can_generate():
            raise
        return _encoder_shape(model)
    return KeyValueShape(layers, heads, width)


def text_key_values(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Return keys and values ``[L, 2, A_kv, T, D]`` of a text's T token ids.

    Raises:
        ConfigError: If the model's keys and values depend on an input.
    """
    try:
        if not is_encoder_decoder(model):
            return key_values(model, ids)
    except BackboneError:
        if model.can_generate():
            raise
    raise ConfigError(
        f"a prompt that starts as a text needs a decoder alone: in {type(model).__name__} a text's keys and "
        "values depend on the input; leave the text out, or use init_weights='zero'"
    )


def key_values(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Return the keys and values ``[L, 2, A_kv, T, D]`` of token ids, rotations applied.

    Raises:
        BackboneError: If the model keeps more than equal keys and values in every layer.
    """
    try:
        layers = cached(model, torch.tensor([list(ids)], device=device_of(model)))
        rows = [torch.stack([layer.keys[0], layer.values[0]]) for layer in layers]
        return torch.stack([row.to("cpu", torch.float32) for row in rows])
    except SoftPromptError:
        raise
    except Exception as cause:  # whatever a model's own code raises on a plain cache
        raise _refused(model) from cause


def _refused(model: PreTrainedModel) -> BackboneError:
    return BackboneError(
        f"{type(model).__name__} keeps more than equal keys and values in every layer, so no prefix can "
        "stand in them; use PromptTuningConfig"
    )


@torch.no_grad()
def cached(model: PreTrainedModel, ids: Tensor) -> Sequence[Any]:
    """Return the cache's self-attention layers after ``ids`` ``[B, T]``.

    Raises:
        BackboneError: If they hold more than keys and values.
    """
    with locked(model), evaluated(model):
        cache = _run(model, ids)
    if not cache.layers:
        raise _refused(model)
    layers = cast(Sequence[Any], cache.layers)
    if any(type(layer) is not DynamicLayer or layer.keys is None for layer in layers):
        raise _refused(model)
    return layers


def _run(model: PreTrainedModel, ids: Tensor) -> Cache:
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    cache: Cache = DynamicCache()
    if is_encoder_decoder(model):
        cache = EncoderDecoderCache(cache, DynamicCache())
        inputs["decoder_input_ids"] = ids
    # Some heads do not return the cache, but it is filled in place.
    model(**inputs, past_key_values=cache, use_cache=True)
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _encoder_shape(model: PreTrainedModel) -> KeyValueShape:
    config = model.config.get_text_config()
    layers, heads, hidden = (
        getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int)):
        raise _refused(model)
    return KeyValueShape(layers, heads, hidden // heads)
