"""Attention over a packed stream, registered with transformers' attention and mask interfaces.

The mask interface hands the layers a ``LayerMask`` as their mask, so it reaches them as an argument, also when
gradient checkpointing runs them again during backward. On a GPU a forest is run by FlexAttention, which has no
backward on the CPU; equality with the padded blocks is tested on the CPU, its speed has not been measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

from softprompt.engine.forest.plan import Block, MaskRule, Visibility
from softprompt.errors import BackboneError

NAME = "softprompt_forest"
"""Name of the attention implementation in ``config._attn_implementation``."""

_UNSUPPORTED = ("s_aux", "head_mask")
_plan: ContextVar[tuple[Visibility, Sequence[Tensor]] | None] = ContextVar("softprompt_forest_plan", default=None)


@dataclass(slots=True)
class LayerMask:
    """A visibility passed as an attention mask, with its additive form kept per dtype."""

    visibility: Visibility
    bias: Tensor | None
    prefixes: Sequence[Tensor]
    _additive: dict[tuple[torch.dtype, int], list[Tensor]]
    _flex: list[BlockMask | None]

    @classmethod
    def of(cls, visibility: Visibility, bias: Tensor | None = None, prefixes: Sequence[Tensor] = ()) -> LayerMask:
        """Wrap a visibility.

        Args:
            visibility: Who sees whom.
            bias: Added to the scores, by query and key position, ``[A, N, N]`` (T5).
            prefixes: Keys and values ``[L, 2, A_kv, P, D]`` that stand behind the stream's, in the order in
                which the visibility counts them.
        """
        return cls(visibility, bias, prefixes, {}, [])

    def behind(self, stream: Tensor, module: nn.Module, part: int) -> Tensor:
        """Return keys (part 0) or values (1) of a stream ``[N, A_kv · D]`` with those of the prefixes behind."""
        if not self.prefixes:
            return stream
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int):
            raise BackboneError(f"{type(module).__name__} does not know its layer")
        own = [prefix[index, part].to(stream.device, stream.dtype) for prefix in self.prefixes]
        return torch.cat([stream, *(each.transpose(0, 1).flatten(1) for each in own)])

    def flex(self) -> BlockMask | None:
        """Return the mask of the GPU kernel, None where it does not apply."""
        if not self._flex:
            self._flex.append(None if self.bias is not None else self.visibility.flex())
        return self._flex[0]

    def additive(self, dtype: torch.dtype, repeats: int) -> list[Tensor]:
        """Return a mask ``[G, 1 or A, repeats · Tq, Tk]`` a block, -inf where unseen."""
        key = (dtype, repeats)
        if key not in self._additive:
            self._additive[key] = [
                self._block_mask(block, dtype).repeat(1, 1, repeats, 1) for block in self.visibility.blocks
            ]
        return self._additive[key]

    def _block_mask(self, block: Block, dtype: torch.dtype) -> Tensor:
        if self.bias is None:
            values = torch.zeros(block.sees.shape, dtype=dtype, device=block.sees.device).unsqueeze(1)
        else:
            queries = self.visibility.query_positions[block.queries].unsqueeze(2)
            keys = self.visibility.key_positions[block.keys].unsqueeze(1)
            values = self.bias.to(dtype)[:, queries, keys].transpose(0, 1)  # [G, A, Tq, Tk]
        return values.masked_fill(~block.sees.unsqueeze(1), -math.inf)


@contextmanager
def planned(visibility: Visibility, prefixes: Sequence[Tensor] = ()) -> Iterator[None]:
    """Make every mask of the context's passes from a plan; run them with ``attention=NAME``.

    Args:
        visibility: Who sees whom.
        prefixes: Keys and values ``[L, 2, A_kv, P, D]`` that it counts behind the stream's.
    """
    token = _plan.set((visibility, prefixes))
    try:
        yield
    finally:
        _plan.reset(token)


def forest_mask(*, mask_function: MaskRule, **_: Any) -> LayerMask | None:
    """Mask interface: the plan of the pass, under the layer kind's own rule."""
    plan = _plan.get()
    if plan is None:
        return None
    visibility, prefixes = plan
    return LayerMask.of(visibility.restricted(mask_function), prefixes=prefixes)


def forest_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LayerMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention interface: queries ``[1, A, N, D]`` and keys ``[1, A_kv, N, D]`` to ``[1, N, A, D]``.

    Raises:
        BackboneError: For attention sinks, biases and the like, and without a plan.
    """
    refuse(module, kwargs, _UNSUPPORTED)
    if not isinstance(attention_mask, LayerMask):
        raise BackboneError(f"{type(module).__name__} made its own attention mask")
    _, heads, tokens, width = query.shape
    repeats = heads // key.shape[1]
    if kwargs.get("position_bias") not in (None, attention_mask):
        raise BackboneError(f"{type(module).__name__} adds a position bias of its own")
    scale = width**-0.5 if scaling is None else scaling
    flex = attention_mask.flex() if query.device.type == "cuda" and not (softcap or dropout) else None
    if flex is not None:
        return attend_flex(query, key, value, flex, scale).transpose(1, 2).contiguous(), None
    masks = attention_mask.additive(query.dtype, repeats)
    streams = [
        _stream(query),
        attention_mask.behind(_stream(key), module, 0),
        attention_mask.behind(_stream(value), module, 1),
    ]
    outputs = []
    for block, mask in zip(attention_mask.visibility.blocks, masks, strict=True):
        q, k, v = _gathered(streams, block, key.shape[1], repeats)
        mixed = attend_block(q, k, v, mask, scale, softcap=softcap, dropout=dropout)
        outputs.append(flattened(mixed, repeats))
    packed = F.embedding(attention_mask.visibility.where, torch.cat(outputs))
    return packed.view(1, tokens, heads, -1), None


def refuse(module: nn.Module, kwargs: dict[str, Any], names: Sequence[str]) -> None:
    """Refuse arguments of attention that ours does not support.

    Raises:
        BackboneError: If one of ``names`` is among its arguments.
    """
    for name in names:
        if kwargs.get(name) is not None:
            raise BackboneError(f"{type(module).__name__} passes {name} to attention")


def _stream(part: Tensor) -> Tensor:
    """Return ``[N, A · D]`` from ``[1, A, N, D]``, a view where a linear layer just made it."""
    return part[0].transpose(0, 1).flatten(1)


def _gathered(streams: list[Tensor], block: Block, kv_heads: int, repeats: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries ``[G, A_kv, repeats · Tq, D]``, keys and values ``[G, A_kv, Tk, D]``."""
    query, key, value = streams
    groups = block.queries.shape[0]
    q = folded(query, block.queries, kv_heads, repeats)
    k, v = (
        F.embedding(block.keys, part).view(groups, block.keys.shape[1], kv_heads, -1).transpose(1, 2)
        for part in (key, value)
    )
    return q, k, v


def folded(stream: Tensor, index: Tensor, kv_heads: int, repeats: int) -> Tensor:
    """Return queries ``[G, A_kv, repeats · Tq, D]`` of a stream ``[N, A · D]`` at ``[G, Tq]``.

    The query heads that share a key head stand behind each other as further queries, so
    grouped keys are never copied per head. ``F.embedding`` is a gather with a fast backward.
    """
    groups, length = index.shape
    q = F.embedding(index, stream).view(groups, length, kv_heads, repeats, -1)
    return q.permute(0, 2, 3, 1, 4).reshape(groups, kv_heads, repeats * length, -1)


def flattened(mixed: Tensor, repeats: int) -> Tensor:
    """Return ``[G · Tq, A · D]`` from ``[G, A_kv, repeats · Tq, D]``."""
    groups, kv_heads, _, width = mixed.shape
    parts = mixed.view(groups, kv_heads, repeats, -1, width).permute(0, 3, 1, 2, 4)
    return parts.reshape(-1, kv_heads * repeats * width)


def attend_block(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, *, softcap: float | None, dropout: float = 0.0
) -> Tensor:
    """Return what queries ``[G, A_kv, Tq, D]`` take from values under an additive mask."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    scores = softcap * torch.tanh((q @ k.transpose(-1, -2)) * scale / softcap)
    weights = torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout, training=dropout > 0) @ v


def attend_flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Return ``[1, A, N, D]`` from queries ``[1, A, N, D]`` and keys and values ``[1, A_kv, N, D]``."""
    run = _compiled() if query.device.type == "cuda" else flex_attention
    grouped = query.shape[1] != key.shape[1]
    return cast(Tensor, run(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped))


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


AttentionInterface.register(NAME, forest_attention_forward)
AttentionMaskInterface.register(NAME, forest_mask)
