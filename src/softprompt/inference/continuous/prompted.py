"""The model's own ``generate``, and input log-probabilities, behind the prompts of requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.attach import BASE, BatchPrompts, injected, prompted_generation
from softprompt.backbone import Facts, vocabulary_of
from softprompt.engine import Engine, EngineRow
from softprompt.inference.continuous.request import Request


def generate_prompted(
    model: PreTrainedModel, facts: Facts, requests: Sequence[Request], kwargs: dict[str, Any]
) -> None:
    """Run ``generate`` with each row behind its request's prompt; prompts are all of one kind."""
    at = [each.at for each in requests]
    prompts = BatchPrompts.of([each.prompt for each in requests], at=at if any(at) else None)
    vocabulary = vocabulary_of(model)
    try:
        with (
            torch.no_grad(),
            injected(model, facts, vocabulary, prompts, [BASE] * len(requests)),
            prompted_generation(model, facts, prompts, kwargs) as prepared,
        ):
            cast(Any, model).generate(**prepared)
    finally:
        vocabulary.remove()


@torch.no_grad()
def input_logits(engine: Engine, request: Request) -> Tensor:
    """Return the logits ``[T - 1, V]`` that predict a request's input tokens, but the first."""
    ids, at = request.ids, request.at
    before = at if request.prompt is not None else 0
    parts = []
    if before > 1:  # tokens in front of the prompt do not see it
        parts.append(engine.target_outputs([EngineRow(ids[:1], ids[1:before])]).logits)
    first = max(1, before)
    if first < len(ids):
        row = EngineRow(ids[:first], ids[first:], request.prompt, before)
        parts.append(engine.target_outputs([row]).logits)
    return torch.cat(parts) if parts else torch.empty(0, 1)
