"""Prompts of keys and values in a forest: behind the stream's keys, seen by the rows below them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.backbone import key_value_shape
from softprompt.engine.forest.plan import Plan
from softprompt.engine.forest.visibility import Span, Visibility, padded
from softprompt.engine.rows import Engine, EngineRow, is_keys_and_values, prompt_length
from softprompt.engine.selfcheck import PROBED_LENGTHS, difference
from softprompt.errors import SoftPromptError

logger = logging.getLogger(__name__)

_unread: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class ForestPrefixes:
    """Who sees whom in a stream whose keys are followed by those of prefixes.

    Attributes:
        visibility: Who sees whom; key N is the first of the first prefix.
        values: The prefixes ``[L, 2, A_kv, P, D]``, in order.
    """

    visibility: Visibility
    values: tuple[Tensor, ...]


def forest_prefixes(
    plan: Plan, rows: Sequence[EngineRow], prompts: Sequence[Tensor]
) -> ForestPrefixes:
    """Put the used prompts of keys and values behind a stream, at positions 0 to P - 1."""
    used = sorted(
        {row.prompt for row in rows if row.prompt >= 0 and is_keys_and_values(prompts[row.prompt])}
    )
    if not used:
        return ForestPrefixes(plan.visibility(), ())
    keys: dict[int, Tensor] = {}
    positions, first = [plan.positions], len(plan)
    for prompt in used:
        count = prompt_length(prompts, prompt)
        keys[prompt] = torch.arange(first, first + count)
        positions.append(torch.arange(count))
        first += count
    kinds = [[_behind(span, keys.get(span.owner)) for span in kind] for kind in plan.kinds]
    seen = padded(kinds, plan.positions, torch.cat(positions))
    return ForestPrefixes(seen, tuple(prompts[prompt] for prompt in used))


def _behind(span: Span, keys: Tensor | None) -> Span:
    """Return a span whose queries see further keys before their own."""
    if keys is None:
        return span
    sees = torch.ones(len(span.queries), len(keys), dtype=torch.bool)
    return replace(
        span, keys=torch.cat([keys, span.keys]), sees=torch.cat([sees, span.sees], dim=1)
    )


def why_unread(model: PreTrainedModel, candidate: Callable[[], Engine], plain: Engine) -> str:
    """Return how a forest reads keys and values otherwise than the plain path; empty when alike.

    Remembered per model; the candidate is made for the probe alone.
    """
    if model not in _unread:
        shape = key_value_shape(model)
        generator = torch.Generator().manual_seed(0)
        prompts = [
            torch.randn(shape.layers, 2, shape.heads, n, shape.width, generator=generator).to(
                model.device
            )
            for n in PROBED_LENGTHS
        ]
        try:
            problem = difference(candidate(), plain, model, prompts) or ""
        except SoftPromptError as cause:
            problem = str(cause)
        _unread[model] = problem
        if problem:
            name = type(model).__name__
            logger.info("prefixes run on the plain path for %s (forest: %s)", name, problem)
    return _unread[model]
