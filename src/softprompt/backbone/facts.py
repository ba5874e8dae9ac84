"""What the rest of the library needs to know about a base model, read once.

``backbone`` and ``engine`` are the only places that know how transformers spells things.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from softprompt.backbone.sharding import require_readable
from softprompt.backbone.state import input_embedding, is_encoder_decoder, resting, stamp_of, state_of, takes_cache
from softprompt.errors import BackboneError
from softprompt.prompts import initialisers


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts of one base model.

    Attributes:
        architecture: Class name, such as ``LlamaForCausalLM``.
        is_encoder_decoder: Whether the prompt stands before an encoder's input.
        token_dim: Width of the embeddings and of a prompt (H); may be narrower than the hidden size.
        vocabulary: Rows of the embedding table (V); ids from V on are virtual.
        num_layers: Transformer layers (L).
        num_attention_heads: Attention heads (A).
        context_length: Most positions the model has, in tokens; None when its positions are relative.
        rope_changes_at: Length past which all rotary positions of a batch depend on its longest row
            (rope types dynamic and longrope); None where they never do.
        embedding_rms: Root mean square of an embedding as the model sees it.
        accepts_position_ids: Whether ``forward`` takes ``position_ids``.
        takes_cache: Whether ``forward`` takes a cache of keys and values, as decoders do.
        positions_from_ids: Whether positions are counted from the ids that are not padding (RoBERTa).
        pad_id: An id that is safe to put where the mask is zero.
    """

    architecture: str
    is_encoder_decoder: bool
    token_dim: int
    vocabulary: int
    num_layers: int
    num_attention_heads: int
    context_length: int | None
    rope_changes_at: int | None
    embedding_rms: float
    accepts_position_ids: bool
    takes_cache: bool
    positions_from_ids: bool
    pad_id: int


def facts_of(model: PreTrainedModel) -> Facts:
    """Return the facts of a loaded model, read once.

    They are read again after its embedding table was replaced, resized, written to, moved or
    converted, and after its config was given another padding id.

    Raises:
        BackboneError: If it has no input embedding or its config lacks a size.
    """
    table = input_embedding(model)
    with resting(model):
        stamp = stamp_of(table.weight), model.config.get_text_config().pad_token_id
        return state_of(model).once("facts", lambda: _read(model, table), stamp)


def _read(model: PreTrainedModel, table: nn.Embedding) -> Facts:
    config = model.config.get_text_config()
    from_ids = _counts_positions_from_ids(model)
    pad = config.pad_token_id
    arguments = inspect.signature(model.forward).parameters
    require_readable(model, table.weight)
    vocabulary, width = table.weight.shape
    return Facts(
        architecture=type(model).__name__,
        is_encoder_decoder=is_encoder_decoder(model),
        token_dim=width,
        vocabulary=vocabulary,
        num_layers=_size(config, "num_hidden_layers", "num_layers", "n_layer"),
        num_attention_heads=_size(config, "num_attention_heads", "n_head", "num_heads", default=1),
        context_length=_context_length(config, from_ids),
        rope_changes_at=_rope_changes_at(config),
        embedding_rms=_embedding_rms(table),
        accepts_position_ids="position_ids" in arguments,
        takes_cache=takes_cache(model),
        positions_from_ids=from_ids,
        pad_id=pad if isinstance(pad, int) and 0 <= pad < vocabulary else 0,
    )


def is_bidirectional(model: PreTrainedModel) -> bool:
    """Tell, from what its attention says of itself, whether a token's state depends on the tokens behind it."""
    flags = {flag for part in model.modules() if isinstance(flag := getattr(part, "is_causal", None), bool)}
    return True not in flags if flags else not facts_of(model).takes_cache


def skips_layers(model: nn.Module) -> bool:
    """Tell whether a pass may leave out layers of the model (LayerDrop, in training)."""
    return model.training and any(getattr(module, "layerdrop", 0.0) for module in model.modules())


def start_id(model: PreTrainedModel) -> int | None:
    """Return the token that starts every text (BOS); None for encoders, where any first token does (CLS).

    Raises:
        BackboneError: If the model's texts start with no such token (T5).
    """
    if not takes_cache(model):
        return None
    start = getattr(model.config.get_text_config(), "bos_token_id", None)
    if not isinstance(start, int):
        raise BackboneError(
            f"{type(model).__name__} has no token that starts every text, so no prompt can stand behind it; "
            "use placement prefix"
        )
    return start


def has_windows(stack: nn.Module) -> bool:
    """Tell whether some layers of a model, encoder or decoder see only a stretch of the input."""
    kinds = getattr(getattr(stack, "config", None), "layer_types", None) or ()
    return any(kind != "full_attention" for kind in kinds)


def output_limit(model: PreTrainedModel) -> int | None:
    """Return the most positions the decoder of a seq2seq model has; None when relative."""
    return _context_length(model.config.get_text_config(), False)


def _size(config: Any, *names: str, default: int | None = None) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    if default is not None:
        return default
    raise BackboneError(f"the model's config has none of {', '.join(names)}; is it a text model?")


def _context_length(config: Any, from_ids: bool) -> int | None:
    for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0 and not _relative(config):
            # RoBERTa's table starts at padding_idx + 1, so that many positions do not exist.
            return value - (config.pad_token_id + 1) if from_ids else value
    return None


def _rope_changes_at(config: Any) -> int | None:
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = parameters.values() if "rope_type" not in parameters else (parameters,)
    changing = [k for k in kinds if isinstance(k, dict) and k.get("rope_type") in ("dynamic", "longrope")]
    if not changing:
        return None
    original = changing[0].get("original_max_position_embeddings")
    return int(original or config.max_position_embeddings)


def _relative(config: Any) -> bool:
    return hasattr(config, "relative_attention_num_buckets") or bool(getattr(config, "alibi", False))


def _counts_positions_from_ids(model: PreTrainedModel) -> bool:
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.padding_idx is not None
    return False


def _embedding_rms(table: nn.Embedding) -> float:
    if table.weight.is_meta and not hasattr(table, "_hf_hook"):
        return math.nan
    return initialisers.rms(initialisers.lookup(table), table.weight.shape[0])
