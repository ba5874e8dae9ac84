"""Where prompts stand in a padded batch.

A row of T text columns becomes P + T columns, P being the longest prompt of the batch. The
prompt stands directly before the row's first real token, whatever the padding side:

    right padding   [p0 p1 | t0 t1 t2 . . ]      left padding   [. . p0 p1 | t0 t1 t2]
    no prompt       [ .  . | t0 t1 t2 . . ]      "compact"      [p0 p1 | t0 t1 t2 . .]

A prompt may also stand behind the first tokens of its row, up to its end (``at``):

    right padding   [t0 | p0 p1 | t1 t2 . . ]      left padding   [. . t0 | p0 p1 | t1 t2]

so a text column t behind its prompt is always column P + t, real tokens are contiguous (sliding
windows and ALiBi count columns), and positions come from the mask: a row in a batch is the row
alone. The compact form starts every row at column 0, for encoders that count columns as positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from softprompt.engine.rows import PromptTable
from softprompt.errors import DataError

_PAD = -1


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of one prompted batch.

    Attributes:
        text: Text column that stands at each column of the batch, -1 elsewhere, ``[B, W]``.
        slot: Virtual token (index into the table) at each column, -1 elsewhere, ``[B, W]``.
        mask: 1 at real columns, ``[B, W]``.
        at: Real tokens of each row before its prompt, ``[B, 1]``.
        prompt_width: Columns the prompts take (P); W = P + T.
    """

    text: Tensor
    slot: Tensor
    mask: Tensor
    at: Tensor
    prompt_width: int

    @classmethod
    def of(
        cls,
        mask: Tensor,
        prompts: PromptTable,
        *,
        compact: bool = False,
        text_first: bool = False,
        lead_limit: int | None = None,
    ) -> Self:
        """Lay out a batch with attention mask ``[B, T]`` (1 = real token).

        Args:
            mask: The text's attention mask.
            prompts: The rows' prompts.
            compact: Start every row at column 0 instead of keeping text columns in line.
            text_first: Let the text start at column 0 and put the prompts behind it; positions stay
                those of the prompt where it belongs. For encoders that pool the first column.
            lead_limit: Most padding to leave before a row; a batch that is fed in chunks has its
                prompts in the first chunk, though a row's text may begin in a later one.

        Raises:
            DataError: If a row has fewer real tokens than should stand before its prompt.
        """
        device = mask.device
        total, width = mask.shape[1], prompts.width
        lengths = prompts.lengths.to(device).unsqueeze(1)  # [B, 1]
        at = prompts.at.to(device).unsqueeze(1)  # [B, 1]
        lead, before = _split(mask, at)
        if lead_limit is not None:
            lead = lead.clamp(max=lead_limit)
        cut = torch.where(at > 0, before - lead, 0)  # [B, 1] text columns before the prompt
        begin = torch.zeros_like(lead) if compact else width + lead - lengths
        column = torch.arange(width + total, device=device).unsqueeze(0)  # [1, W]
        index = column - begin  # [B, W] index in the row, padding before it not counted
        virtual = torch.where(
            (index >= cut) & (index < cut + lengths), index - cut, _PAD
        )  # [B, W] virtual token of the prompt
        inside = torch.where(index < cut, index, index - lengths)  # text column from the first real
        is_text = (index >= 0) & (virtual < 0)
        if text_first:
            inside = column.expand_as(index)
            virtual = torch.where((column >= total) & (column - total < lengths), column - total, _PAD)
            is_text = virtual < 0
        text = torch.where(is_text & (inside + lead < total), inside + lead, _PAD)
        slot = torch.where(virtual >= 0, virtual + prompts.starts.to(device).unsqueeze(1), _PAD)
        text_mask = mask.gather(1, text.clamp(min=0)) * (text >= 0)
        return cls(text, slot, torch.where(slot >= 0, 1, text_mask).to(mask.dtype), at, width)

    @property
    def is_plain(self) -> bool:
        """Whether every row starts at column 0, so that default positions are right."""
        return bool((self.mask[:, 0] == 1).all())

    @property
    def first(self) -> Tensor:
        """Where the first real column of each row is, bool ``[B, W]``."""
        real = self.mask.bool()
        return real & (real.long().cumsum(1) == 1)

    def isolated(self, dtype: torch.dtype) -> Tensor:
        """Return an additive mask ``[B, 1, W, W]`` in which virtual tokens see virtual tokens alone."""
        prompt = self.slot >= 0
        allowed = self.mask.bool().unsqueeze(1) & (~prompt.unsqueeze(2) | prompt.unsqueeze(1))
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)

    def ids(self, input_ids: Tensor, vocabulary: int, pad_id: int) -> Tensor:
        """Return ids ``[B, W]`` with virtual ones from ``vocabulary`` on."""
        text = input_ids.gather(1, self.text.clamp(min=0))
        ids = torch.where(self.text >= 0, text, pad_id)
        return torch.where(self.slot >= 0, self.slot + vocabulary, ids)

    def embeds(self, inputs_embeds: Tensor, table: Tensor) -> Tensor:
        """Return embeddings ``[B, W, H]`` from text embeddings ``[B, T, H]`` and virtual tokens ``[N, H]``."""
        batch = torch.arange(self.text.shape[0], device=inputs_embeds.device).unsqueeze(1)
        text = inputs_embeds[batch, self.text.clamp(min=0)]
        if not table.numel():
            return text
        rows = table.to(inputs_embeds.device, inputs_embeds.dtype)[self.slot.clamp(min=0)]
        return torch.where((self.slot >= 0).unsqueeze(-1), rows, text)

    def moved(self, columns: Tensor) -> Tensor:
        """Return the columns ``[B]`` at which text columns ``[B]`` stand."""
        found = (self.text == columns.to(self.text.device).unsqueeze(1)).long().argmax(1)
        known = columns <= self.text.max().to(columns.device)
        return torch.where(known, found.to(columns.device), columns + self.prompt_width)

    def spread(self, values: Tensor, fill: int) -> Tensor:
        """Return per-token values ``[B, T, …]`` at their columns ``[B, W, …]``, ``fill`` elsewhere."""
        batch = torch.arange(self.text.shape[0], device=values.device).unsqueeze(1)
        text = self.text.to(values.device)
        found = values[batch, text.clamp(min=0)]
        return torch.where((text >= 0).view(*text.shape, *[1] * (found.dim() - 2)), found, fill)

    def positions(self, given: Tensor | None = None) -> Tensor:
        """Return position ids ``[B, W]``: counted from the mask, or the caller's moved behind the prompt.

        Args:
            given: Positions of the text ``[B, T]``, or ``[N, B, T]`` of N kinds (of time, height and width
                in models that see); those of a row's prompt end where they start.
        """
        if given is not None and given.dim() == 3:
            return torch.stack([self.positions(each) for each in given])
        prompt = self.slot >= 0
        length = prompt.sum(1, keepdim=True)  # [B, 1]
        row = self.at + prompt.long().cumsum(1) - 1
        real = (self.mask.bool() & ~prompt).long().cumsum(1) - 1
        moved = torch.where((real >= self.at) | (self.at == 0), length, 0)  # [B, W] behind the prompt
        counted = torch.where(prompt, row, (moved + real).clamp(min=0))
        if given is None:
            return counted
        text = self.spread(given.expand(self.text.shape[0], -1), 0) + moved
        return torch.where(self.text >= 0, text, counted)


def _split(mask: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first real column of each row and the one its prompt stands before, both ``[B, 1]``."""
    real = mask.bool()
    total = mask.shape[1]
    lead = torch.where(real.any(1), real.long().argmax(1), total).unsqueeze(1)
    if not bool(at.any()):
        return lead, lead
    seen = real.long().cumsum(1)  # [B, T]
    if bool((at > seen[:, -1:]).any()):
        row = int((at > seen[:, -1:]).nonzero()[0, 0])
        raise DataError(
            f"row {row} has {int(seen[row, -1]):,} tokens, but its prompt should stand behind "
            f"{int(at[row]):,}; give it a longer input or put the prompt earlier"
        )
    behind = (seen >= at).long().argmax(1, keepdim=True) + 1
    return lead, torch.where(at > 0, behind, lead)


_MOVED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "head_mask")
_ELSEWHERE = ("decoder_", "encoder_", "cross_", "past_", "start_", "end_")


def per_token(model: nn.Module, inputs: Mapping[str, Any], shape: Sequence[int]) -> list[str]:
    """Return the arguments of a call that run along its tokens ``[B, T, …]``, beside those that a layout moves.

    By shape and by the model's signature: what its towers take (``get_image_features``) does not.
    """
    found = [
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.dim() > 1 and tuple(value.shape[:2]) == tuple(shape)
        if name not in _MOVED and not name.startswith(_ELSEWHERE)
    ]
    # Most calls have none, and a compiled one cannot be asked for a signature.
    return [name for name in found if name not in _taken_by_towers(cast(Any, type(model)))] if found else found


@cache
def _taken_by_towers(kind: type) -> frozenset[str]:
    towers = (getattr(kind, name) for name in dir(kind) if name.startswith("get_") and name.endswith("_features"))
    return frozenset(name for tower in towers for name in inspect.signature(tower).parameters)


def counts_images(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Tell whether a model makes positions of several kinds from a call's images (M-RoPE)."""
    grids = any(inputs.get(name) is not None for name in ("image_grid_thw", "video_grid_thw"))
    return grids and any(hasattr(part, "get_rope_index") for part in (model, getattr(model, "base_model", None)))


def is_packed(position_ids: Tensor) -> bool:
    """Tell whether positions ``[B, T]`` start again inside a row; those of an image may."""
    if position_ids.dim() != 2:
        return False
    return bool((position_ids[:, 1:] <= position_ids[:, :-1]).any())


def packed_mask(position_ids: Tensor, prompt: int, dtype: torch.dtype) -> Tensor:
    """Return an additive mask ``[B, 1, P + T, P + T]`` for packed rows behind one prompt.

    Each token sees the whole prompt and its own sequence so far, never a neighbour.
    """
    batch, total = position_ids.shape
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    segment = starts.long().cumsum(1)  # [B, T]
    segment = torch.cat([segment.new_zeros(batch, prompt), segment], dim=1)  # [B, P + T]
    same = segment.unsqueeze(2) == segment.unsqueeze(1)
    to_prompt = (segment == 0).unsqueeze(1)
    causal = torch.ones(prompt + total, prompt + total, dtype=torch.bool, device=segment.device).tril()
    allowed = (same | to_prompt) & causal
    mask = torch.zeros(allowed.shape, dtype=dtype, device=segment.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)


def pad_rows(sequences: Sequence[tuple[int, ...]], *, left: bool, pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask ``[B, T]``, padded on one side to the longest row."""
    total = max(1, *(len(sequence) for sequence in sequences))
    ids = torch.full((len(sequences), total), pad_id)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        where = slice(total - len(sequence), total) if left else slice(0, len(sequence))
        ids[i, where] = torch.tensor(sequence, dtype=torch.long)
        mask[i, where] = 1
    return ids, mask
