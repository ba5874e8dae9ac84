"""Optimizer and learning-rate schedule of a prompt's parameters, both counted in updates."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Adafactor

from softprompt.backbone import Base
from softprompt.prompts import CPTEmbedding, PromptEncoder, PromptModule
from softprompt.training.settings import (
    CONTEXT_RATE,
    FALL_BY_LAYERS,
    FEW_LAYERS,
    KEY_VALUE_RATE_PER_RMS,
    NETWORK_RATE,
    RATE_PER_RMS,
    TASK_RATE,
    TuneSettings,
)

logger = logging.getLogger(__name__)

_TASK_PARAMETERS = "prefix_task_"
"""How the names of a multitask prompt's task matrices begin (PEFT's)."""
FAR_ABOVE, FAR_BELOW = 20, 200
"""Times the default from which on a learning rate is worth a warning (docs/training.md has a sweep)."""


@dataclass(frozen=True, slots=True, eq=False)
class Rates:
    """Peak learning rates.

    Attributes:
        prompt: Of the prompt.
        task: Of the task matrices, where there are some.
        rms: Root mean square of the base's embeddings, or of its keys and values.
        usual: The default of ``prompt``.
        scales: What the rate is multiplied with for the keys and for the values of each layer, ``[L, 2]``,
            where these are the parameters; None for everything else.
    """

    prompt: float
    task: float = 0.0
    rms: float = 1.0
    usual: float = 1.0
    scales: Tensor | None = None

    def of(self, name: str) -> float:
        """Return the rate of a parameter."""
        return self.task if name.startswith(_TASK_PARAMETERS) else self.prompt


def peak_rates(settings: TuneSettings, base: Base, prompt: PromptModule, key_values: Tensor | None = None) -> Rates:
    """Return the learning rates of a run, and log them with the scale of what they change.

    Virtual tokens learn at a share of the embeddings' rms, keys and values at a share of their own rms in
    each layer; the networks of P-tuning and of prefix projections at an absolute rate; a context at a share
    of what it may move by.

    Args:
        settings: Hold the rates that were given.
        base: The base.
        prompt: The prompt, untrained.
        key_values: Keys and values of a text in the base, ``[L, 2, A_kv, T, D]``, where they are trained.
    """
    rms, scales = base.facts.embedding_rms, None
    share, scale, what = RATE_PER_RMS, rms, "embedding rms"
    if isinstance(prompt, PromptEncoder) or getattr(prompt, "transform", None) is not None:
        share, scale, what = NETWORK_RATE, 1.0, "unit of a network's weights"
    elif isinstance(prompt, CPTEmbedding):
        share, scale, what = CONTEXT_RATE, _largest_move(prompt), "largest move of a number"
    elif key_values is not None:
        own = key_values.float().square().mean(dim=(2, 3, 4)).sqrt()  # [L, 2]
        rms = scale = float(own.square().mean().sqrt())
        scales, what = own / rms, "rms of keys and values"
        layers = int(own.any(dim=1).sum())  # those without any of their own hold zeros
        share = KEY_VALUE_RATE_PER_RMS * (FEW_LAYERS / max(FEW_LAYERS, layers)) ** FALL_BY_LAYERS
        logger.info(
            "rms of the base's keys %.3g to %.3g, of its values %.3g to %.3g, by layer",
            *(each for part in own.unbind(1) for each in (part.min().item(), part.max().item())),
        )
    rate, usual = settings.learning_rate, share * scale
    if rate is None or isinstance(rate, str):  # which has yet to be probed
        rate = usual
        logger.info("learning rate %.4g (%g x the %s %.4g)", rate, share, what, scale)
    else:
        logger.info("learning rate %.4g as given (%.3g x the %s %.4g)", rate, rate / scale, what, scale)
        if not usual / FAR_BELOW <= rate <= usual * FAR_ABOVE:
            side = "above" if rate > usual else "below"
            logger.warning("learning_rate %.4g is far %s what suits this base, about %.2g", rate, side, usual)
    task_rate = 0.0
    if settings.multitask:
        task_rate = settings.task_learning_rate or TASK_RATE
        logger.info("learning rate of the task matrices %.4g", task_rate)
    return Rates(rate, task_rate, rms, usual, scales)


def _largest_move(prompt: CPTEmbedding) -> float:
    """Return what a number of the context moves by where a move fills its ball evenly."""
    radius = float(prompt.radius.max())
    return radius / math.sqrt(prompt.embedding.weight.shape[1])


def build_optimizer(settings: TuneSettings, prompt: nn.Module, rates: Rates) -> torch.optim.Optimizer:
    """Build the optimizer of a prompt's parameters, each in a group with its own name and peak rate.

    Keys and values ``[P, L·2·A_kv·D]`` are one parameter under PEFT's name. Here each layer's keys and each
    layer's values are a group of their own: a view of the parameter's memory, which is given its part of
    the gradient before each step.

    Adafactor runs with an absolute learning rate: its own relative steps would hide the one scale
    that matters here, the rate against the rms of what is trained.
    """
    groups: list[dict[str, Any]] = []
    views: list[_Views] = []
    for name, value in prompt.named_parameters():
        if not value.requires_grad:
            continue
        if rates.scales is None:
            groups.append(_group(name, value, rates.of(name)))
        else:
            views.append(_Views.of(value, rates.scales))
            groups += views[-1].groups(name, rates)
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adafactor":
        optimizer = Adafactor(  # type: ignore[no-untyped-call]
            groups, lr=rates.prompt, weight_decay=settings.weight_decay, scale_parameter=False, relative_step=False
        )
    else:
        optimizer = torch.optim.AdamW(groups, lr=rates.prompt, weight_decay=settings.weight_decay)
    for each in views:
        optimizer.register_step_pre_hook(each.take_gradient)
    return optimizer


def rate_factor(schedule: str, update: int, total: int, warmup_ratio: float) -> float:
    """Return the share of the peak learning rate for update ``update`` of ``total`` (from 0).

    The first update already moves (it is 1/w of the peak in a warmup of w updates), and the last
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


@dataclass(frozen=True, slots=True, eq=False)
class _Views:
    """Keys and values of each layer as parameters of their own, in the memory of the whole.

    Attributes:
        whole: Keys and values of all layers, ``[P, L·2·A_kv·D]``.
        parts: Views of it, ``[P, A_kv·D]``: layer 0's keys, layer 0's values, layer 1's keys ...
        scales: What the learning rate of each is multiplied with, ``[L, 2]``.
    """

    whole: nn.Parameter
    parts: list[nn.Parameter]
    scales: Tensor

    @classmethod
    def of(cls, whole: nn.Parameter, scales: Tensor) -> _Views:
        parts = [nn.Parameter(part) for part in _parts(whole.detach(), scales)]
        return cls(whole, parts, scales)

    def groups(self, name: str, rates: Rates) -> list[dict[str, Any]]:
        """Return a parameter group for each part."""
        return [
            _group(f"{name}.{i // 2}.{('keys', 'values')[i % 2]}", part, rates.of(name) * scale)
            for i, (part, scale) in enumerate(zip(self.parts, self.scales.flatten().tolist(), strict=True))
        ]

    def take_gradient(self, *step: Any) -> None:
        """Give each part its gradient; a hook before the optimizer's step."""
        if self.whole.grad is None:
            return
        gradients = _parts(self.whole.grad, self.scales)
        for part, gradient in zip(self.parts, gradients, strict=True):
            part.grad = gradient


def _parts(flat: Tensor, scales: Tensor) -> list[Tensor]:
    """Return ``[P, L·2·A_kv·D]`` as views ``[P, A_kv·D]``, one for each of the scales ``[L, 2]``."""
    return list(flat.view(len(flat), scales.numel(), -1).unbind(1))


def _group(name: str, parameter: nn.Parameter, rate: float) -> dict[str, Any]:
    return {"params": [parameter], "name": name, "lr": rate, "peak": rate}
