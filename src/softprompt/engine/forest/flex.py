"""The forest on a GPU: FlexAttention over the packed stream, each prompt's keys read in place.

Nothing is gathered or padded: the kernel asks for each tile whether a query sees a key, from
two numbers a token. It has no backward on the CPU, where the padded blocks are used instead.
Equality with the blocks is tested on the CPU; its speed has not been measured on a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from softprompt.engine.forest.visibility import Visibility


def block_mask(plan: Visibility) -> BlockMask | None:
    """Return the kernel's mask for a forest, None for visibilities that are not a tree."""
    if plan.tree is None:
        return None
    enter, leave = plan.tree
    positions, rule = plan.query_positions, plan.rule

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        below = (enter[key] <= enter[query]) & (enter[query] < leave[key])
        if rule is not None:
            below = below & rule(0, 0, positions[query], positions[key])
        return cast(Tensor, below)

    tokens = int(positions.shape[0])
    device = str(positions.device)
    return create_block_mask(sees, B=None, H=None, Q_LEN=tokens, KV_LEN=tokens, device=device)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Return ``[1, A, N, D]`` from queries ``[1, A, N, D]`` and keys and values ``[1, A_kv, N, D]``."""
    run = _compiled() if query.device.type == "cuda" else flex_attention
    grouped = query.shape[1] != key.shape[1]
    return cast(Tensor, run(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped))


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
