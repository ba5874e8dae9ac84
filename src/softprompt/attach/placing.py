"""Where a prompt stands among the tokens of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.attach.choosing import RowPrompt, one_a_row
from softprompt.attach.heads import BASE
from softprompt.backbone.facts import start_id
from softprompt.errors import ConfigError
from softprompt.prompts.configs import Placement, PromptLearningConfig

PromptAt = Tensor | Sequence[int] | int
"""Real tokens before the prompt, for the batch or for each row."""


def placement_of(config: PromptLearningConfig) -> Placement:
    """Return where the prompt of a configuration stands; kinds without the option stand in front."""
    return Placement(getattr(config, "placement", Placement.PREFIX))


def prompt_offsets(
    model: PreTrainedModel,
    rows: Sequence[RowPrompt],
    configs: dict[str, PromptLearningConfig],
    inputs: dict[str, Any],
    given: PromptAt | None,
) -> list[int] | None:
    """Return how many real tokens stand before each row's prompt, None when all stand in front.

    Args:
        model: The base.
        rows: The prompt of each row.
        configs: Configurations by name.
        inputs: The caller's arguments, for the rows' tokens.
        given: The caller's own offsets, which count before any placement.

    Raises:
        ConfigError: If offsets are of the wrong shape, or a placement needs to be told.
    """
    if given is not None:
        offsets = one_a_row("prompt_at", given, len(rows))
        if min(offsets) < 0:
            raise ConfigError(f"prompt_at counts tokens from 0 on, got {min(offsets)}")
        return offsets
    placements = [
        Placement.PREFIX if row.name == BASE else placement_of(configs[row.name]) for row in rows
    ]
    if all(placement is Placement.PREFIX for placement in placements):
        return None
    if Placement.CHAT_SYSTEM in placements:
        raise ConfigError(
            "placement chat_system needs prompt_at, the tokens before the prompt in each row; "
            "softprompt.load(...) knows the chat template and finds it by itself"
        )
    mask = _mask(inputs)
    lengths = mask.sum(1).tolist()
    after_bos = Placement.AFTER_BOS in placements
    begins = _begins(model, inputs, mask) if after_bos else [0] * len(rows)
    return [
        {Placement.PREFIX: 0, Placement.AFTER_BOS: begin, Placement.SUFFIX: length}[placement]
        for placement, begin, length in zip(placements, begins, lengths, strict=True)
    ]


def _begins(model: PreTrainedModel, inputs: dict[str, Any], mask: Tensor) -> list[int]:
    """Return 1 for rows that begin with the token that starts every text, else 0."""
    ids = inputs.get("input_ids")
    if ids is None:
        raise ConfigError("placement after_bos needs input_ids; pass them, or give prompt_at")
    first = mask.long().argmax(1, keepdim=True)
    start = start_id(model)
    found = ids.gather(1, first.to(ids.device))[:, 0]
    return [int(i) for i in (torch.ones_like(found) if start is None else found == start).tolist()]


def _mask(inputs: dict[str, Any]) -> Tensor:
    ids = inputs.get("input_ids")
    tokens: Tensor = ids if ids is not None else inputs["inputs_embeds"]
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    return torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
