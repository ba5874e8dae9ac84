"""The modules in which a model looks up its ids, however its architecture names them."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.errors import BackboneError


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Tell whether the model has an encoder and a decoder."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def input_embedding(model: PreTrainedModel) -> nn.Embedding:
    """Return the module that embeds the ids a prompt stands before (the encoder's, where there is one).

    Raises:
        BackboneError: If the model has none.
    """
    owner = model.get_encoder() if is_encoder_decoder(model) else model
    try:
        table = cast(PreTrainedModel, owner).get_input_embeddings()
    except NotImplementedError:
        table = None
    if table is None or not isinstance(getattr(table, "weight", None), Tensor):
        raise BackboneError(
            f"{type(model).__name__} has no input embedding table, so no prompt can stand before its input; "
            "use a text model"
        )
    return cast(nn.Embedding, _looked_up(model, cast(nn.Embedding, table)))


def _looked_up(model: PreTrainedModel, table: nn.Embedding) -> nn.Module:
    """Return the module a table's ids go through: T5 without its decoder has a twin that is never run."""
    encoder = model.get_encoder()
    if isinstance(encoder, PreTrainedModel):
        inner = encoder.get_input_embeddings()
        if getattr(inner, "weight", None) is table.weight:
            return inner
    return table


def decoder_embedding(model: PreTrainedModel) -> nn.Embedding:
    """Return the module in which the decoder of a seq2seq model looks ids up; the encoder's may be another."""
    decoder = cast(Any, model).get_decoder()
    return cast(nn.Embedding, decoder.get_input_embeddings())


def side_embeddings(model: PreTrainedModel) -> list[nn.Embedding]:
    """Return further tables that are looked up with the input ids: Gemma's per-layer embeddings."""
    return [
        module
        for name, module in model.named_modules()
        if name.endswith("embed_tokens_per_layer") and isinstance(module, nn.Embedding)
    ]
