"""The gradient of a prefix under reentrant gradient checkpointing.

There each layer has a backward of its own, which would run through whatever made the prefix once a
layer and find its graph freed. So the layers get a leaf; what gathers in it is handed on when
the embedding's gradient is computed, the last of the pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.backbone.facts import is_encoder_decoder, recomputes_layers
from softprompt.engine.prefixes import Prefixes


class _HandOn(torch.autograd.Function):
    """Return the embeddings; in backward, hand what gathered in the leaf on to the prefix."""

    @staticmethod
    def forward(ctx: Any, embeds: Tensor, table: Tensor, leaf: Tensor) -> Tensor:
        ctx.leaf = leaf
        return embeds.view_as(embeds)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gathered, ctx.leaf.grad = ctx.leaf.grad, None
        return gradients[0], gathered, None


def reentrant(model: nn.Module) -> bool:
    """Tell whether layers will be checkpointed with a backward of their own each.

    Asked before ``recomputed_alike`` wraps the function that does it.
    """
    if not recomputes_layers(model):
        return False
    for module in model.modules():
        run = getattr(module, "_gradient_checkpointing_func", None)
        if run is not None:
            return bool(getattr(run, "keywords", {}).get("use_reentrant", True))
    return False


@contextmanager
def gathered_gradient(model: PreTrainedModel, prefixes: Prefixes) -> Iterator[Prefixes]:
    """Yield the same prefixes over a leaf whose gradient reaches the given ones after backward."""
    table = prefixes.table
    leaf = table.detach().requires_grad_()

    def hand_on(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, _HandOn).apply(output, table, leaf))

    owners: list[Any] = [model]
    if is_encoder_decoder(model):
        owners = [model.get_encoder(), cast(Any, model).get_decoder()]
    embeddings = {id(e): e for e in (owner.get_input_embeddings() for owner in owners)}
    handles = [embedding.register_forward_hook(hand_on) for embedding in embeddings.values()]
    try:
        yield replace(prefixes, table=leaf)
    finally:
        for handle in handles:
            handle.remove()
