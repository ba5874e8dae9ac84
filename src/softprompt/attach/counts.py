"""Counting parameters."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def count(module: nn.Module, *, trainable: bool, without: Collection[nn.Parameter] = ()) -> int:
    """Count the parameters of a module, or only those that train, some left out."""
    excluded = {id(parameter) for parameter in without}
    return sum(
        parameter.numel()
        for parameter in module.parameters()
        if (parameter.requires_grad or not trainable) and id(parameter) not in excluded
    )


def sentence(trainable: int, total: int) -> str:
    """Say the counts in PEFT's words."""
    share = 100 * trainable / total
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"
