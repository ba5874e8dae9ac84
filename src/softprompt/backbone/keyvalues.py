"""Keys and values of a base's layers: their shape, which layers read a prefix, and those of a text."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from softprompt.backbone.passes import evaluated
from softprompt.backbone.sharding import shard_of
from softprompt.backbone.state import device_of, is_encoder_decoder, locked, state_of, with_cache
from softprompt.errors import BackboneError, ConfigError, SoftPromptError


@dataclass(frozen=True, slots=True)
class KeyValueShape:
    """Sizes of the self-attention that a prefix stands in: L, A_kv and D.

    Of layers that differ, D is the widest and A_kv is that layer's, as in PEFT; L counts those too that read the
    keys and values of another layer.
    """

    layers: int
    heads: int
    width: int


def key_value_shape(model: PreTrainedModel) -> KeyValueShape:
    """Return the sizes of a model's keys and values, found once; no pass of the model is run.

    A copy of the model without weights runs instead. One whose passes look at values cannot, and has the
    sizes that its configuration says.

    Raises:
        BackboneError: If it keeps anything else for what it has read.
    """
    return state_of(model).once("keys and values", lambda: _shape(model))


def _shape(model: PreTrainedModel) -> KeyValueShape:
    if shard_of(model) == "tp":
        raise BackboneError(
            f"{type(model).__name__} is split by heads (shard tp), so a prefix fits the layers of no process; use "
            "PromptTuningConfig, or shard fsdp"
        )
    try:
        layers = _weightless_layers(model)
    except BackboneError:
        if model.can_generate():
            raise
        layers = None
    if layers is None:
        return _shape_of_config(model)
    sizes = [(layer.keys.shape[3], layer.keys.shape[1]) for layer in layers]
    width, heads = max(sizes, key=lambda size: size[0])
    return KeyValueShape(len(layers) + len(_sharing_layers(model)), heads, width)


_LOOKS = "warn_if_padding_and_no_attention_mask"
"""A method of transformers' models that looks at the ids."""


def _weightless_layers(model: PreTrainedModel) -> Sequence[Any] | None:
    """Return the cache's layers after one token in a copy without weights; None where that cannot run.

    Raises:
        BackboneError: If they hold more than keys and values of one size.
    """
    try:
        config = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config._attn_implementation = "eager"
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            # Grouped products have no shapes in float32.
            twin: Any = cast(Any, type(model))(config).to(torch.bfloat16).eval()
            for part in twin.modules():
                if hasattr(part, _LOOKS):
                    setattr(part, _LOOKS, lambda *_: None)
            return _layers(twin, torch.zeros(1, 1, dtype=torch.long))
    except BackboneError:
        raise
    except Exception:  # whatever a model's own code raises without weights
        return None


def _sharing_layers(model: PreTrainedModel) -> dict[int, str]:
    """Return the layers that read the keys and values of another, with their kind (Gemma 3n and 4)."""
    modules = (each for each in model.modules() if getattr(each, "is_kv_shared_layer", False))
    return {cast(Any, each).layer_idx: cast(Any, each).layer_type for each in modules}


def prefix_sources(model: PreTrainedModel) -> tuple[int | None, ...] | None:
    """Return the layer whose prefix each layer reads, None for none; None where each of L layers reads its own.

    A layer with more or wider heads than a prefix has reads none, one that reads the keys and values of another
    layer has that one's prefix. As in PEFT, a warning names those with no prefix of their own, once.

    Raises:
        BackboneError: If no layer reads one.
    """
    return state_of(model).once("layers that read a prefix", lambda: _sources(model))


def _sources(model: PreTrainedModel) -> tuple[int | None, ...] | None:
    config, sharing, shape = model.config.get_text_config(), _sharing_layers(model), key_value_shape(model)
    if not sharing and not getattr(config, "is_heterogeneous", False):
        return None
    kinds = list(getattr(config, "layer_types", None) or ())
    own = [
        index
        for index, each in enumerate(config.per_layer_config)
        if index not in sharing
        and getattr(each, "num_key_value_heads", shape.heads) <= shape.heads
        and getattr(each, "head_dim", shape.width) <= shape.width
    ]
    skipped = [index for index in range(shape.layers) if index not in own]
    if not own:
        raise BackboneError(
            "Prefix tuning skipped every layer because no layer's KV shape matched the provisioned prefix "
            f"(num_attention_heads={shape.heads}, head_dim={shape.width}); use PromptTuningConfig"
        )
    if skipped:
        warnings.warn(
            f"Prefix tuning injected into layers {own}; skipped {skipped} due to KV shape mismatch or shared-KV "
            "layers.",
            stacklevel=2,
        )
    first = min(sharing, default=shape.layers)
    stored = {kind: index for index, kind in enumerate(kinds[:first])}  # the last layer of each kind
    found = {index: stored.get(kind) for index, kind in sharing.items()} | {index: index for index in own}
    return tuple(source if (source := found.get(i)) in own else None for i in range(shape.layers))


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

    Narrower layers are filled up with zeros; so are those that a prefix cannot stand in.

    Raises:
        BackboneError: If the model keeps more than keys and values of one size in a layer.
    """
    try:
        shape = key_value_shape(model)
        with locked(model), evaluated(model):
            layers = _layers(model, torch.tensor([list(ids)], device=device_of(model)))
        rows = [torch.stack([layer.keys[0], layer.values[0]]).to("cpu", torch.float32) for layer in layers]
        found = torch.zeros(shape.layers, 2, shape.heads, len(ids), shape.width)
        for kept, row in zip(found, rows, strict=False):
            if row.shape[1] <= shape.heads:
                kept[:, : row.shape[1], :, : row.shape[3]] = row
        return found
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
def _layers(model: PreTrainedModel, ids: Tensor) -> Sequence[Any]:
    """Return the cache's self-attention layers after ``ids`` ``[B, T]``.

    Raises:
        BackboneError: If they hold more than keys and values of one size.
    """
    inputs: dict[str, Any] = {"input_ids": ids}
    if not ids.is_meta:
        inputs["attention_mask"] = torch.ones_like(ids)
    cache: Cache = DynamicCache()
    if is_encoder_decoder(model):
        cache = EncoderDecoderCache(cache, DynamicCache())
        inputs["decoder_input_ids"] = ids
    # Some heads do not return the cache, but it is filled in place.
    model(**with_cache(model, inputs, cache), use_cache=True)
    layers: Sequence[Any] = (cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache).layers
    plain = (type(each) is DynamicLayer and each.keys is not None for each in layers)
    if not layers or not all(plain) or any(each.keys.shape != each.values.shape for each in layers):
        raise _refused(model)
    return layers


def _shape_of_config(model: PreTrainedModel) -> KeyValueShape:
    config = model.config.get_text_config(decoder=True)
    layers, heads, hidden = (
        getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    hybrid = any("attention" not in kind or "linear" in kind for kind in kinds)
    if hybrid or not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int)):
        raise _refused(model)
    if getattr(config, "is_heterogeneous", False):
        config = max(config.per_layer_config, key=lambda layer: cast(int, layer.head_dim))
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or hidden // heads
    heads = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None) or heads
    return KeyValueShape(layers, heads, width)
