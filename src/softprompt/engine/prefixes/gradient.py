"""The gradient of a prefix under reentrant gradient checkpointing.

There each layer has a backward of its own, which would run through whatever made the prefix once a
layer and find its graph freed. So the layers get a leaf; what gathers in it is handed on when
the embedding's gradient is computed, the last of the pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from softprompt.backbone import Base, recomputes_layers


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


def _reentrant(model: nn.Module) -> bool:
    """Tell whether layers will be checkpointed with a backward of their own each.

    Call it before ``recomputed_alike`` wraps the function that does it.
    """
    if not recomputes_layers(model):
        return False
    for module in model.modules():
        run = getattr(module, "_gradient_checkpointing_func", None)
        if run is not None:
            return bool(getattr(run, "keywords", {}).get("use_reentrant", True))
    return False


@contextmanager
def gathered_gradient(base: Base, values: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the same values as leaves, where that is needed, whose gradients reach them after backward."""
    model = base.model
    trained = any(value.requires_grad for value in values) and torch.is_grad_enabled()
    if not (trained and _reentrant(model)):
        yield list(values)
        return
    leaves = [value.detach().requires_grad_(value.requires_grad) for value in values]

    def hand_on(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        for value, leaf in zip(values, leaves, strict=True):
            if value.requires_grad:
                output = cast(Any, _HandOn).apply(output, value, leaf)
        return output

    owners: list[Any] = [model]
    if base.is_encoder_decoder:
        owners = [model.get_encoder(), cast(Any, model).get_decoder()]
    embeddings = {id(e): e for e in (owner.get_input_embeddings() for owner in owners)}
    handles = [embedding.register_forward_hook(hand_on) for embedding in embeddings.values()]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()
