"""Prefixes inside attention: each layer puts its row's keys and values before the text's.

The mask interface hands the layers a ``PrefixMask`` as their mask. The prefix travels with
it as an argument, so gradient checkpointing, which drops caches and runs layers again in
backward, stays exact; and the cache holds the text alone, so ``generate`` counts as ever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from softprompt.engine import Prefixes
from softprompt.engine.forest import MaskRule
from softprompt.errors import BackboneError

NAME = "softprompt_prefix"
"""Name of the attention implementation in ``config._attn_implementation``."""

EAGER = "eager"


@dataclass(slots=True)
class PrefixPlan:
    """What the masks of a pass are made from.

    Attributes:
        prefixes: The rows' prefixes.
        inner: The model's own attention implementation, which computes the attention.
        causal_only: Whether only causal attention has them, as in the decoder of a seq2seq model.
        idle: Whether the pass that runs has none.
    """

    prefixes: Prefixes
    inner: str
    causal_only: bool
    idle: bool = False


active_plan: ContextVar[PrefixPlan | None] = ContextVar("softprompt_prefix_plan", default=None)


@dataclass(slots=True)
class PrefixMask:
    """A mask over prefix and text, with the prefix, passed as an attention mask.

    Attributes:
        mask: What the inner implementation takes, ``[B, 1, Tq, P + Tk]``.
        inner: Name of the inner implementation.
        prefixes: The rows' prefixes; None where the attention has none.
        positions: Position of the first query of each row, by which relative biases count, ``[B]``.
        biases: Relative bias of the prefix that a layer made for those above it, ``[B, A, Tq, P]``, once it has;
            a list, which copies of the mask share (FSDP2 copies what layers are given).
    """

    mask: Tensor | None
    inner: str
    prefixes: Prefixes | None = None
    positions: Tensor | None = None
    biases: list[Tensor] = field(default_factory=list)

    def __getitem__(self, part: Any) -> PrefixMask:
        """Return the mask of a part of the queries, as Gemma 4 takes of any mask."""
        return self if self.mask is None else replace(self, mask=self.mask[part])


def prefix_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: MaskRule,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> PrefixMask:
    """Mask interface: who sees whom, prefix included, under the layer kind's own rule.

    Raises:
        BackboneError: Without a plan, or for a rule that takes more than positions.
    """
    plan = active_plan.get()
    if plan is None:
        raise BackboneError("a prefix mask was requested outside a prefixed pass")
    if plan.idle or (plan.causal_only and not _is_causal(mask_function, device)):
        make = cast(Any, AttentionMaskInterface)()[plan.inner]
        own = make(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            dtype=dtype,
            device=device,
            **kwargs,
        )
        return PrefixMask(own, plan.inner)
    prefixes = plan.prefixes.repeated(batch_size)
    lengths, before = (part.to(device).view(-1, 1, 1, 1) for part in (prefixes.lengths, prefixes.positions))
    row = torch.arange(batch_size, device=device).view(-1, 1, 1, 1)
    lead, real = _padding(attention_mask, batch_size, kv_length, kv_offset, device)
    # Columns as they would be with the prefix behind a row's padding and before its text.
    query = (torch.arange(q_length, device=device) + q_offset).view(1, 1, -1, 1) + before
    text = (torch.arange(kv_length, device=device) + kv_offset).view(1, 1, 1, -1) + before
    slot = torch.arange(prefixes.width, device=device).view(1, 1, 1, -1)
    rule = cast(Callable[..., Tensor], mask_function)
    head = torch.zeros_like(row)
    try:
        sees_text = rule(row, head, query, text) & real
        sees_prefix = rule(row, head, query, slot + lead) & (slot < lengths)
    except (IndexError, RuntimeError, ValueError, TypeError) as cause:
        raise BackboneError("the model's attention mask depends on more than positions") from cause
    shape = (batch_size, 1, q_length, -1)
    mask = torch.cat([sees_prefix.expand(*shape), sees_text.expand(*shape)], dim=3)
    if plan.inner == EAGER:
        hidden = torch.finfo(dtype).min
        mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, hidden)
    return PrefixMask(mask, plan.inner, prefixes, (query[:, 0, 0, 0] - lead[:, 0, 0, 0]))


def _is_causal(rule: MaskRule, device: torch.device | str) -> bool:
    """Tell whether a rule hides what stands behind a token."""
    first, second = (torch.full((1, 1, 1, 1), i, device=device) for i in (0, 1))
    return not bool(cast(Callable[..., Tensor], rule)(first, first, first, second))


def _padding(
    mask: Tensor | None, rows: int, columns: int, offset: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Return each row's columns before its first token ``[B, 1, 1, 1]``, and the real ones ``[B, 1, 1, Tk]``."""
    if mask is None:
        ones = torch.ones(rows, 1, 1, columns, dtype=torch.bool, device=device)
        return torch.zeros(rows, 1, 1, 1, dtype=torch.long, device=device), ones
    real = mask.to(device).bool()
    lead = torch.where(real.any(1), real.long().argmax(1), real.shape[1])
    real = F.pad(real, (0, max(0, columns + offset - real.shape[1])))
    return lead.view(-1, 1, 1, 1), real[:, None, None, offset : offset + columns]


def prefix_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: PrefixMask | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention interface: the model's own attention over the prefix and the text.

    Raises:
        BackboneError: If the layer does not know its number or adds a bias of its own.
    """
    if not isinstance(attention_mask, PrefixMask):
        raise BackboneError(f"{type(module).__name__} made its own attention mask")
    run = _inner(module, attention_mask.inner)
    mask, prefixes = attention_mask.mask, attention_mask.prefixes
    if prefixes is not None:
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or index >= prefixes.layers:
            raise BackboneError(f"{type(module).__name__} does not know its layer")
        source = prefixes.source(index)
        if source is None:  # a layer that no prefix fits
            return run(module, query, key, value, cast(Tensor, mask)[..., prefixes.width :], **kwargs)
        heads, width = key.shape[1], key.shape[3]
        keys, values = (part[:, :heads, :, :width] for part in prefixes.layer(source, key))
        key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        if kwargs.get("position_bias") is not None:
            before = _prefix_bias(module, attention_mask, prefixes, query.shape[2])
            own = kwargs["position_bias"].expand(before.shape[0], -1, -1, -1)
            kwargs["position_bias"] = torch.cat([before, own], dim=3)
    return run(module, query, key, value, mask, **kwargs)


def _inner(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if name != EAGER:
        return cast(Callable[..., tuple[Tensor, Tensor | None]], cast(Any, AttentionInterface)()[name])
    found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if found is None:
        raise BackboneError(f"{type(module).__name__} has no eager attention to call")
    return cast(Callable[..., tuple[Tensor, Tensor | None]], found)


def _prefix_bias(module: nn.Module, mask: PrefixMask, prefixes: Prefixes, queries: int) -> Tensor:
    """Return T5's relative bias between queries and prefix ``[B, A, Tq, P]``, by positions in the row."""
    if getattr(module, "has_relative_attention_bias", False):
        starts = cast(Tensor, mask.positions).tolist()
        of = {
            start: cast(Any, module).compute_bias(queries, prefixes.width, past_seen_tokens=start)
            for start in set(starts)
        }
        mask.biases[:] = [torch.cat([of[start] for start in starts])]
    if not mask.biases:
        raise BackboneError(f"{type(module).__name__} adds a position bias of its own")
    return mask.biases[0]


AttentionInterface.register(NAME, prefix_attention_forward)
AttentionMaskInterface.register(NAME, prefix_mask)
