"""Optimiser and learning-rate schedule of a prompt's parameters, both counted in updates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Adafactor

from softprompt.training.settings import TuneSettings

_TASK_PARAMETERS = "prefix_task_"
"""How the names of a multitask prompt's task matrices begin (PEFT's)."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Peak learning rates: of the prompt, and of the task matrices where there are some."""

    prompt: float
    task: float = 0.0

    def of(self, name: str) -> float:
        """Return the rate of a parameter."""
        return self.task if name.startswith(_TASK_PARAMETERS) else self.prompt


def trained(prompt: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name, in the order the optimiser has them."""
    return {name: value for name, value in prompt.named_parameters() if value.requires_grad}


def build_optimizer(
    settings: TuneSettings, prompt: nn.Module, rates: Rates
) -> torch.optim.Optimizer:
    """Build the optimiser of a prompt's parameters, each in a group with its own peak rate.

    Adafactor runs with an absolute learning rate: its own relative steps would hide the one scale
    that matters here, the rate against the embedding's rms.
    """
    groups = [
        {"params": [value], "lr": rates.of(name), "peak": rates.of(name)}
        for name, value in trained(prompt).items()
    ]
    if settings.optimizer == "adafactor":
        return Adafactor(  # type: ignore[no-untyped-call]
            groups,
            lr=rates.prompt,
            weight_decay=settings.weight_decay,
            scale_parameter=False,
            relative_step=False,
        )
    return torch.optim.AdamW(groups, lr=rates.prompt, weight_decay=settings.weight_decay)


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


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rates of the next update to a share of their peaks."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
