"""Attention of a stream of new tokens over the lanes that hold what stands before them.

Registered with transformers' attention and mask interfaces like the forest's. The new keys are
written into the lanes, and each lane is read through a view: the rows with one new token as one
batch for each capacity, a row with several (a part of its input) alone, so nothing is padded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from softprompt.engine.decode.lanes import KeyValueStore, Lane
from softprompt.engine.forest import MaskRule, attend_block, flattened, folded, refuse
from softprompt.errors import BackboneError

NAME = "softprompt_decode"
"""Name of the attention implementation in ``config._attn_implementation``."""

_UNSUPPORTED = ("s_aux", "head_mask", "position_bias")


@dataclass(frozen=True, slots=True)
class Writes:
    """Where the new tokens of one capacity go.

    Attributes:
        values: The lanes' keys and values, ``[L, 2, slots, A_kv, capacity, D]``.
        tokens: Stream index of each new token, ``[n]``; None when they are the whole stream.
        slots: Its lane, ``[n]``.
        positions: Its position in the lane, ``[n]``.
    """

    values: Tensor
    tokens: Tensor | None
    slots: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True)
class Reads:
    """Queries that see the keys of some lanes.

    Attributes:
        values: The lanes' keys and values, ``[L, 2, G, A_kv, Tk, D]``.
        tokens: Stream index of each lane's queries, 0 for a lane without any, ``[G, Tq]``.
        positions: Position of each query in its lane, 0 where there is none, ``[G, Tq]``.
        kept: Lanes that have a query ``[m]``; None when all do.
    """

    values: Tensor
    tokens: Tensor
    positions: Tensor
    kept: Tensor | None


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One pass: the tokens of the reads, one after another, are the stream in order."""

    writes: tuple[Writes, ...]
    reads: tuple[Reads, ...]


active: ContextVar[DecodePlan | None] = ContextVar("softprompt_decode_plan", default=None)


@dataclass(frozen=True, slots=True)
class DecodeMask:
    """A plan under one layer kind's rule, passed as an attention mask.

    Attributes:
        plan: The plan.
        biases: For each read what is added to its scores, ``[G, 1, Tq, Tk]``.
    """

    plan: DecodePlan
    biases: tuple[Tensor, ...]


def decode_plan(
    store: KeyValueStore, rows: Sequence[tuple[Lane, int]], device: torch.device
) -> tuple[DecodePlan, list[int]]:
    """Plan a pass, and return the order in which rows stand in its stream.

    Args:
        store: The lanes.
        rows: Lane and new tokens of each row.
        device: Where the model is.
    """
    single = [i for i, (_, count) in enumerate(rows) if count == 1]
    single.sort(key=lambda i: (rows[i][0].capacity, rows[i][0].slot))
    order = [*single, *(i for i, (_, count) in enumerate(rows) if count > 1)]
    reads: list[Reads] = []
    written: dict[int, list[tuple[int, int, int]]] = {}
    at, done = 0, 0
    while done < len(order):
        lane, count = rows[order[done]]
        capacity, values = lane.capacity, store.groups[lane.capacity].values
        together = [lane]
        if count == 1:
            together = [rows[i][0] for i in single[done:] if rows[i][0].capacity == capacity]
            reads.append(_steps(values, together, at, device))
        else:
            reads.append(_stretch(values, lane, count, at, device))
        for each in together:
            written.setdefault(capacity, []).extend((at + i, each.slot, each.length + i) for i in range(count))
            at += count
        done += len(together)
    writes = []
    for capacity, new in written.items():
        tokens, slots, positions = torch.tensor(new, device=device).T
        all_of_it = len(written) == 1
        values = store.groups[capacity].values
        writes.append(Writes(values, None if all_of_it else tokens, slots, positions))
    return DecodePlan(tuple(writes), tuple(reads)), order


def _steps(values: Tensor, lanes: Sequence[Lane], at: int, device: torch.device) -> Reads:
    """Read lanes that have one new token each, in the order of their slots."""
    slots = [lane.slot for lane in lanes]
    first, end = slots[0], slots[-1] + 1
    longest = max(lane.length for lane in lanes) + 1
    seen = values[:, :, first:end, :, :longest]
    # Lists first: writing into a tensor one element at a time takes longer than the attention.
    tokens, positions = [0] * (end - first), [0] * (end - first)
    for i, lane in enumerate(lanes):
        tokens[lane.slot - first], positions[lane.slot - first] = at + i, lane.length
    kept = None
    if len(lanes) < end - first:
        kept = torch.tensor([slot - first for slot in slots], device=device)
    columns = torch.tensor([tokens, positions], device=device).unsqueeze(2)
    return Reads(seen, columns[0], columns[1], kept)


def _stretch(values: Tensor, lane: Lane, count: int, at: int, device: torch.device) -> Reads:
    """Read one lane with several new tokens."""
    end = lane.length + count
    return Reads(
        values[:, :, lane.slot : lane.slot + 1, :, :end],
        torch.arange(at, at + count, device=device).unsqueeze(0),
        torch.arange(lane.length, end, device=device).unsqueeze(0),
        None,
    )


def decode_mask(*, mask_function: MaskRule, dtype: torch.dtype = torch.float32, **_: Any) -> DecodeMask:
    """Mask interface: the plan of the pass, under the layer kind's own rule.

    Raises:
        BackboneError: Without a plan.
    """
    plan = active.get()
    if plan is None:
        raise BackboneError("a decode mask was requested outside a decode pass")
    rule = cast(Callable[..., Tensor], mask_function)
    biases = []
    for read in plan.reads:
        queries = read.positions.unsqueeze(2)  # [G, Tq, 1]
        keys = torch.arange(read.values.shape[4], device=queries.device).view(1, 1, -1)
        sees = rule(0, 0, queries, keys) & (keys <= queries)
        bias = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
        biases.append(bias.masked_fill_(~sees, -math.inf).unsqueeze(1))
    return DecodeMask(plan, tuple(biases))


def decode_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: DecodeMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention interface: queries ``[1, A, N, D]`` and new keys ``[1, A_kv, N, D]`` to ``[1, N, A, D]``.

    Raises:
        BackboneError: For attention sinks, biases and the like, and without a plan.
    """
    refuse(module, kwargs, _UNSUPPORTED)
    if not isinstance(attention_mask, DecodeMask):
        raise BackboneError(f"{type(module).__name__} made its own attention mask")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise BackboneError(f"{type(module).__name__} does not know its layer")
    _, heads, tokens, width = query.shape
    kv_heads = key.shape[1]
    repeats = heads // kv_heads
    scale = width**-0.5 if scaling is None else scaling
    _write(attention_mask.plan, layer, key, value)
    stream = query[0].transpose(0, 1).reshape(tokens, heads * width)
    outputs = []
    for read, bias in zip(attention_mask.plan.reads, attention_mask.biases, strict=True):
        q = folded(stream, read.tokens, kv_heads, repeats)
        keys, values = read.values[layer]
        mixed = attend_block(q, keys, values, _repeated(bias, repeats), scale, softcap=softcap)
        if read.kept is not None:
            mixed = mixed.index_select(0, read.kept)
        outputs.append(flattened(mixed, repeats))
    packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return packed.view(1, tokens, heads, -1), None


def _repeated(bias: Tensor, repeats: int) -> Tensor:
    """Return the bias of queries that stand behind each other ``repeats`` times."""
    if repeats == 1:
        return bias
    if bias.shape[2] == 1:
        return bias.expand(-1, -1, repeats, -1)
    return bias.repeat(1, 1, repeats, 1)


def _write(plan: DecodePlan, layer: int, key: Tensor, value: Tensor) -> None:
    for write in plan.writes:
        for part, new in enumerate((key, value)):
            stream = new[0].transpose(0, 1)  # [N, A_kv, D]
            own = stream if write.tokens is None else stream.index_select(0, write.tokens)
            write.values[layer, part][write.slots, :, write.positions] = own


AttentionInterface.register(NAME, decode_attention_forward)
AttentionMaskInterface.register(NAME, decode_mask)
