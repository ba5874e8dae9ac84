"""Optimiser and learning-rate schedule of the prompt, both counted in updates."""

from __future__ import annotations

import math

import torch
from torch.nn import Parameter
from transformers import Adafactor

from softprompt.training.settings import TuneSettings


def build_optimizer(
    settings: TuneSettings, prompt: Parameter, learning_rate: float
) -> torch.optim.Optimizer:
    """Build the optimiser of the prompt's rows ``[P, H]``.

    Adafactor runs with an absolute learning rate: its own relative steps would hide the one scale
    that matters here, the rate against the embedding's rms.
    """
    if settings.optimizer == "adafactor":
        return Adafactor(  # type: ignore[no-untyped-call]
            [prompt],
            lr=learning_rate,
            weight_decay=settings.weight_decay,
            scale_parameter=False,
            relative_step=False,
        )
    return torch.optim.AdamW([prompt], lr=learning_rate, weight_decay=settings.weight_decay)


def rate_factor(schedule: str, update: int, total: int, warmup_ratio: float) -> float:
    """Return the share of the peak learning rate for update ``update`` of ``total`` (from 0).

    The first update already moves (it is 1/w of the peak in a warm-up of w updates), and the last
    one still does, so no update is wasted on a rate of zero.
    """
    warmup = min(round(total * warmup_ratio), total - 1)
    if update < warmup:
        return (update + 1) / (warmup + 1)
    progress = (update - warmup) / (total - warmup)
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate
