"""Where a prompt stands among the tokens of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from softprompt.attach.choosing import RowPrompt, one_a_row
from softprompt.attach.heads import BASE
from softprompt.attach.parts import DECODER
from softprompt.attach.tasks import IGNORED
from softprompt.backbone import is_encoder_decoder, start_id
from softprompt.errors import ConfigError
from softprompt.prompts import Placement, PromptLearningConfig, TaskType

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

    Returns:
        Where nothing is given, a suffix stands behind the input: before the first label of its row, and
        behind all tokens of a row without labels.

    Raises:
        ConfigError: If offsets are of the wrong shape or would be ignored, or a placement needs to be told.
    """
    if given is not None:
        offsets = one_a_row("prompt_at", given, len(rows))
        if min(offsets) < 0:
            raise ConfigError(f"prompt_at counts tokens from 0 on, got {min(offsets)}")
        _check_in_input(model, rows, configs, offsets)
        return offsets
    placements = [
        Placement.PREFIX if row.name == BASE else placement_of(configs[row.name]) for row in rows
    ]
    encoded = inputs.get("encoder_outputs") is not None
    if encoded or all(placement is Placement.PREFIX for placement in placements):
        return None
    if Placement.CHAT_SYSTEM in placements:
        raise ConfigError(
            "placement chat_system needs prompt_at, the tokens before the prompt in each row; "
            "softprompt.load(...) knows the chat template and finds it by itself"
        )
    mask = _mask(inputs)
    none = [0] * len(rows)
    begins = _begins(model, inputs, mask) if Placement.AFTER_BOS in placements else none
    predicts = any(config.task_type is TaskType.CAUSAL_LM for config in configs.values())
    labels = inputs.get("labels") if predicts and not _goes_on(inputs) else None
    behind = Placement.SUFFIX in placements
    ends = _ends(mask, labels, [p is Placement.SUFFIX for p in placements]) if behind else none
    return [
        {Placement.PREFIX: 0, Placement.AFTER_BOS: begin, Placement.SUFFIX: end}[placement]
        for placement, begin, end in zip(placements, begins, ends, strict=True)
    ]


def _check_in_input(
    model: PreTrainedModel,
    rows: Sequence[RowPrompt],
    configs: dict[str, PromptLearningConfig],
    offsets: Sequence[int],
) -> None:
    """Refuse an offset of a prompt that has no rows in the (encoder's) input."""
    for row, offset in zip(rows, offsets, strict=True):
        config = configs.get(row.name)
        types = getattr(config, "output_model_types", None)
        decoder = types == [DECODER] and is_encoder_decoder(model)
        if offset and (decoder or (config is not None and config.keys_and_values)):
            where = "before the decoder's input" if decoder else "before all tokens of each layer"
            raise ConfigError(
                f"prompt_at would be ignored: the prompt {row.name!r} stands {where}; leave it out"
            )


def _goes_on(inputs: dict[str, Any]) -> bool:
    """Return whether a call goes on from a cache, which holds the prompts already."""
    cache = inputs.get("past_key_values")
    return isinstance(cache, Cache) and cache.get_seq_length() > 0


def _ends(mask: Tensor, labels: Tensor | None, wanted: Sequence[bool]) -> list[int]:
    """Return the real tokens of each row before its first label; all of a row without one.

    A prompt behind its row's labels would predict none of them and get no gradient.
    """
    real = mask.long()
    if labels is None:
        return [int(count) for count in real.sum(1).tolist()]
    answered = (labels != IGNORED).long().cumsum(1).to(real.device) > 0
    before = [int(count) for count in real.masked_fill(answered, 0).sum(1).tolist()]
    for number, (count, behind) in enumerate(zip(before, wanted, strict=True)):
        if behind and not count:
            raise ConfigError(
                f"placement suffix stands between input and answer, but row {number} begins with a label; "
                f"give the input's labels {IGNORED}, or give prompt_at"
            )
    return before


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
