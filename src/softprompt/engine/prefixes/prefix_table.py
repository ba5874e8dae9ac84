"""Keys and values that stand before the tokens of each row of a batch, and their gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from softprompt.backbone import Base, recomputes_layers
from softprompt.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Prefixes:
    """The prefixes of a batch of rows and which row has which, made by ``Prefixes.of(prompts)``.

    Rows with the same ``Prompt`` object share it.

    Attributes:
        table: Keys and values, padded behind to the longest, ``[K, L, 2, A_kv, P, D]``.
        owner: Prefix of each row, -1 for none, ``[B]``.
        lengths: Virtual tokens of each row's prefix, 0 for none, ``[B]``.
    """

    table: Tensor
    owner: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Prompt | None]) -> Self | None:
        """Gather the prefixes of rows, None when no row has one.

        Args:
            prompts: Each row's prompt, None for none; one without keys and values counts as none.
        """
        found = {
            prompt: prompt.prefix
            for prompt in dict.fromkeys(prompts)
            if prompt is not None and prompt.prefix is not None
        }
        if not found:
            return None
        width = max(prompt.prefix_tokens for prompt in found)
        number: dict[Prompt | None, int] = {prompt: i for i, prompt in enumerate(found)}
        padded = [F.pad(p, (0, 0, 0, width - int(p.shape[3]))) for p in found.values()]
        lengths = [p.prefix_tokens if p is not None and p in number else 0 for p in prompts]
        device = padded[0].device
        return cls(
            torch.stack(padded) if len(padded) > 1 else padded[0].unsqueeze(0),
            torch.tensor([number.get(prompt, -1) for prompt in prompts], device=device),
            torch.tensor(lengths, device=device),
        )

    @property
    def width(self) -> int:
        """Length of the longest prefix (P)."""
        return int(self.table.shape[4])

    @property
    def layers(self) -> int:
        """Layers (L)."""
        return int(self.table.shape[1])

    def repeated(self, rows: int) -> Prefixes:
        """Return the same prefixes for a batch whose rows were each repeated (beams, samples)."""
        times = rows // self.lengths.shape[0]
        if times == 1:
            return self
        return replace(
            self,
            owner=self.owner.repeat_interleave(times),
            lengths=self.lengths.repeat_interleave(times),
        )

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values ``[B, A_kv, P, D]``, in dtype and on the device of ``like``."""
        values = self.table[:, index].to(like.device, like.dtype)  # [K, 2, A_kv, P, D]
        owner = self.owner.to(like.device)
        if values.shape[0] == 1:
            # Rows without a prefix get one that their mask hides.
            rows = values.expand(owner.shape[0], -1, -1, -1, -1)
        else:
            rows = values.index_select(0, owner.clamp(min=0))
        return rows[:, 0], rows[:, 1]

    def columns(self) -> Tensor:
        """Return which columns of shifted prefixes are real, bool ``[B, P]``."""
        column = torch.arange(self.width, device=self.lengths.device)
        return column >= self.width - self.lengths.unsqueeze(1)

    def fill(self, cache: Cache, like: Tensor) -> None:
        """Put the prefixes into an empty cache, in dtype and on the device of ``like``."""
        for index in range(self.layers):
            cache.update(*self.layer(index, like), index)

    def shifted(self) -> Prefixes:
        """Return the same prefixes padded in front, so that each ends in the last column."""
        width = self.width
        lengths = [0] * self.table.shape[0]
        for owner, length in zip(self.owner.tolist(), self.lengths.tolist(), strict=True):
            lengths[owner if owner >= 0 else 0] = max(length, lengths[owner if owner >= 0 else 0])
        rolled = [part.roll(width - n, dims=3) for part, n in zip(self.table, lengths, strict=True)]
        return replace(self, table=torch.stack(rolled))


# Under reentrant gradient checkpointing each layer has a backward of its own, which would run through
# whatever made the prefix once a layer and find its graph freed. So the layers get a leaf; what gathers in
# it is handed on when the embedding's gradient is computed, the last of the pass.


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
