"""The model's own ``generate`` and scores behind prompts that are given as values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.attach import BASE, LentPrompts, PromptParts, RowPrompt, lent, prompted_generation
from softprompt.backbone import Facts, vocabulary_of
from softprompt.engine import Engine, EngineRow, is_keys_and_values
from softprompt.inference.continuous.request import PromptValue, Request


def generate_valued(
    model: PreTrainedModel, facts: Facts, requests: Sequence[Request], kwargs: dict[str, Any]
) -> None:
    """Run ``generate`` with each row behind its request's prompt; prompts are all of one kind."""
    values = {each.prompt.key: each.prompt for each in requests if each.prompt is not None}
    rows = [RowPrompt(BASE if each.prompt is None else each.prompt.key) for each in requests]
    at = [each.at for each in requests]
    prompts = LentPrompts.of(
        rows,
        lambda row: _parts(values[row.name]),
        sees_input=all(value.sees_input for value in values.values()),
        at=at if any(at) else None,
    )
    vocabulary = vocabulary_of(model)
    # The names are keys of values, not of heads that the model may have.
    bare = [RowPrompt(BASE)] * len(rows)
    try:
        with (
            torch.no_grad(),
            lent(model, facts, vocabulary, bare, prompts),
            prompted_generation(model, facts, prompts, kwargs) as prepared,
        ):
            cast(Any, model).generate(**prepared)
    finally:
        vocabulary.remove()


def _parts(prompt: PromptValue) -> PromptParts:
    if prompt.value is not None and is_keys_and_values(prompt.value):
        return PromptParts(None, prefix=prompt.value)
    return PromptParts(prompt.value, prompt.decoder)


@torch.no_grad()
def input_logits(engine: Engine, request: Request) -> Tensor:
    """Return the logits ``[T - 1, V]`` that predict a request's input tokens, but the first."""
    prompt = None if request.prompt is None else request.prompt.value
    ids, at = request.ids, request.at
    before = at if prompt is not None else 0
    parts = []
    if before > 1:  # tokens in front of the prompt do not see it
        parts.append(engine.target_outputs([EngineRow(ids[:1], ids[1:before], -1)], []).logits)
    first = max(1, before)
    if first < len(ids):
        row = EngineRow(ids[:first], ids[first:], -1 if prompt is None else 0, before)
        parts.append(engine.target_outputs([row], [] if prompt is None else [prompt]).logits)
    return torch.cat(parts) if parts else torch.empty(0, 1)
