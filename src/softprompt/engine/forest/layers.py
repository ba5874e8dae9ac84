"""Running a stack of layers on real tokens only, between its embeddings and its head.

Hooks on the layers take the padding out before the first one and, where wanted, put it back
after the last; in between each layer is handed visibilities as its masks. What
happens before and after (positions, pooling, heads) is the model's own code on its own shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softprompt.backbone import has_windows
from softprompt.engine.forest.forest_attention import LayerMask
from softprompt.errors import BackboneError

_SELF, _CROSS = "attention_mask", "encoder_attention_mask"
_PLACED = ("position_embeddings", "position_ids")
"""What layers take for each column of the padded batch beside the hidden states (rotary encoders)."""

_BIASES = {_SELF: "position_bias", _CROSS: "encoder_decoder_position_bias"}
"""Where a layer takes the relative position bias that belongs to a mask (T5)."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the tokens of a packed stream stand in a padded grid.

    Attributes:
        take: Flat index ``b · W + w`` of each packed token, ``[N]``.
        shape: Rows and columns of the grid (B, W).
        home: Packed index of what stands in each cell, -1 for nothing, ``[B, W]``; None where every
            token stands in one cell alone.
    """

    take: Tensor
    shape: tuple[int, int]
    home: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor) -> Packing:
        """Pack the cells where a mask ``[B, W]`` is 1, row by row."""
        return cls(mask.reshape(-1).nonzero()[:, 0], (int(mask.shape[0]), int(mask.shape[1])))

    @classmethod
    def by_column(cls, positions: Tensor) -> Packing:
        """Lay tokens ``[N]`` out so that each column is a position, for stacks that count columns.

        Tokens of one position (beginnings of many rows, branches of a tree) go to rows of their own.
        """
        order = positions.argsort(stable=True)
        column = positions[order]
        first = torch.searchsorted(column, column)  # [N] where its position begins
        row = torch.empty_like(positions)
        row[order] = torch.arange(len(order)) - first
        width = int(positions.max()) + 1
        return cls(row * width + positions, (int(row.max()) + 1, width))

    @classmethod
    def in_line(cls, tokens: int) -> Packing:
        """Lay tokens out as they are, for stacks whose positions are in their attention alone."""
        return cls(torch.arange(tokens), (1, tokens))

    def grid(self, values: Tensor, fill: int) -> Tensor:
        """Return values ``[N]`` in their cells ``[B, W]``, ``fill`` elsewhere."""
        flat = values.new_full((self.shape[0] * self.shape[1],), fill)
        return flat.index_copy(0, self.take, values).view(self.shape)

    def to(self, device: torch.device) -> Packing:
        """Return the same packing on a device."""
        home = None if self.home is None else self.home.to(device)
        return Packing(self.take.to(device), self.shape, home)

    @classmethod
    def sharing(cls, mask: Tensor, slot: Tensor) -> Packing:
        """Pack the cells where a mask ``[B, W]`` is 1, each virtual token once, where it first stands.

        Args:
            mask: 1 in real cells.
            slot: The virtual token that stands in each cell, -1 elsewhere, ``[B, W]``.
        """
        flat, rows = mask.bool().reshape(-1), slot.reshape(-1)
        cell = torch.arange(len(flat), device=flat.device)
        virtual = rows >= 0
        first = cell.new_full((int(rows.max()) + 2,), len(flat))
        first = first.scatter_reduce(0, rows[virtual], cell[virtual], "amin")
        home = torch.where(virtual, first[rows.clamp(min=0)], cell)
        kept = flat & (home == cell)
        index = torch.where(flat, (kept.long().cumsum(0) - 1)[home], -1).view(mask.shape)
        return cls(kept.nonzero()[:, 0], (int(mask.shape[0]), int(mask.shape[1])), index)

    def packed(self, values: Tensor) -> Tensor:
        """Return ``[1, N, ...]`` from ``[B, W, ...]``, or from ``[1, W, ...]`` that all rows share."""
        rows = values.expand(self.shape[0], *values.shape[1:])
        if rows.is_floating_point() and rows.dim() == 3:
            # A gather with a fast backward.
            return F.embedding(self.take, rows.flatten(0, 1)).unsqueeze(0)
        return rows.flatten(0, 1)[self.take].unsqueeze(0)

    def packed_alike(self, value: Any) -> Any:
        """Return tensors that hold a value a cell, in tuples or alone, packed like hidden states."""
        if isinstance(value, tuple):
            return tuple(self.packed_alike(each) for each in value)
        batch, width = self.shape
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == width:
            return self.packed(value) if value.shape[0] in (1, batch) else value
        return value

    def unpacked(self, hidden: Tensor) -> Tensor:
        """Return ``[B, W, H]`` from ``[1, N, H]``, zeros where nothing is real."""
        if self.home is not None:
            standing = F.embedding(self.home.clamp(min=0), hidden[0])
            return standing * (self.home >= 0).unsqueeze(-1)
        flat = hidden.new_zeros(self.shape[0] * self.shape[1], hidden.shape[2])
        return flat.index_copy(0, self.take, hidden[0]).view(*self.shape, -1)


def layers_of(stack: nn.Module, *, windows: bool = False) -> nn.ModuleList:
    """Return the layers of an encoder or decoder.

    Args:
        stack: The encoder or decoder.
        windows: Whether its layers are given the masks the model makes for each kind of layer.

    Raises:
        BackboneError: If the stack has no single list of them, or layers that see only a
            window, which one mask for all would ignore.
    """
    if not windows and has_windows(stack):
        raise BackboneError(f"{type(stack).__name__} has layers that see only a window")
    lists = [m for m in stack.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise BackboneError(f"{type(stack).__name__} has no list of layers")
    return lists[0]


@contextmanager
def packed_layers(
    layers: nn.ModuleList,
    packing: Packing,
    mask: LayerMask,
    *,
    cross: LayerMask | None = None,
    keep: Tensor | None = None,
    unpack: bool = False,
) -> Iterator[None]:
    """Run the layers on a packed stream inside the context.

    Args:
        layers: The layers, run in order.
        packing: The padding to take out.
        mask: Who sees whom in the stream; where the model makes such a mask for a kind of layer
            itself (``forest_attention`` with a plan), that one, with this one's bias.
        cross: Who sees which encoder state, for decoder layers.
        keep: Tokens of the stream to hand on after the last layer ``[K]``; None for all.
        unpack: Whether to put the padding back after the last layer.
    """
    masks = {_SELF: mask} | ({_CROSS: cross} if cross is not None else {})
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            hook = _before(layer, masks, packing, first=index == 0)
            stack.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
        if keep is not None:
            stack.enter_context(layers[-1].register_forward_hook(_after(lambda hidden: hidden[:, keep])))
        if unpack:
            stack.enter_context(layers[-1].register_forward_hook(_after(packing.unpacked)))
        yield


def _before(layer: nn.Module, masks: dict[str, LayerMask], packing: Packing, *, first: bool) -> Any:
    names = list(inspect.signature(layer.forward).parameters)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if first:
            given[names[0]] = packing.packed(given[names[0]])
        for name in _PLACED:
            if name in given:
                given[name] = packing.packed_alike(given[name])
        for name, whole in masks.items():
            mask = given[name] = _ruled(given.get(name), whole)
            if _BIASES[name] in names:
                # The bias is part of the mask; anything but None keeps T5 from computing it N x N.
                given[_BIASES[name]] = mask
        hidden = given.pop(names[0])
        return (hidden,), given

    return hook


def _ruled(made: Any, whole: LayerMask) -> LayerMask:
    """Return the mask the model made for a kind of layer, the whole one where it made none."""
    if not isinstance(made, LayerMask):
        return whole
    return made if whole.bias is None else LayerMask.of(made.visibility, whole.bias)


def _after(change: Callable[[Tensor], Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    return hook


def relative_bias(stack: nn.Module, length: int) -> Tensor | None:
    """Return T5's relative position bias ``[A, length, length]``, None for other stacks.

    Raises:
        BackboneError: If its layers have biases of their own each.
    """
    owners = [m for m in stack.modules() if getattr(m, "has_relative_attention_bias", False)]
    if not owners:
        return None
    if len(owners) > 1:
        raise BackboneError(f"{type(stack).__name__} has a position bias in every layer")
    with torch.no_grad():
        bias: Tensor = cast(Any, owners[0]).compute_bias(length, length)[0]
    return bias
