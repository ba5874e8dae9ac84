"""Prefix tuning on an attached model: sizes, first values, and what a call may hold."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from softprompt.backbone import Base, Facts, key_value_shape, output_limit
from softprompt.engine import Prefixes, check_context, is_packed, prefix_path
from softprompt.errors import ConfigError
from softprompt.prompts import PrefixTuningConfig, PromptLearningConfig

logger = logging.getLogger(__name__)


def check_kind(config: PromptLearningConfig, shared: PromptLearningConfig | None) -> None:
    """Raise for prefixes and prompts in the input on one model.

    Raises:
        ConfigError: If ``config`` is of another kind than the prompt that is already attached.
    """
    if shared is not None and config.keys_and_values != shared.keys_and_values:
        raise ConfigError(
            f"all prompts on one model are prefixes or none is: it has {shared.peft_type}, got "
            f"{config.peft_type}; attach this one to a model of its own"
        )


def sized(config: PromptLearningConfig, model: PreTrainedModel, facts: Facts) -> None:
    """Fill in the sizes of the base's keys and values.

    Raises:
        BackboneError: If no prefix can stand in this base.
        ConfigError: If the configuration names other sizes.
    """
    shape = key_value_shape(model)
    prefix_path(Base.of(model))
    sizes = {
        "num_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "token_dim": shape.heads * shape.width,
    }
    for name, size in sizes.items():
        given = getattr(config, name)
        # A seq2seq prompt is stored with every second layer empty.
        doubled = name == "num_layers" and facts.is_encoder_decoder and given == 2 * size
        if given not in (None, size) and not doubled:
            raise ConfigError(
                f"{name} is {given}, but {facts.architecture}'s keys and values need {size}; leave it out, or "
                "use the base the prefix was made for"
            )
        setattr(config, name, size)
    config.num_transformer_submodules = 1
    if isinstance(config, PrefixTuningConfig) and config.prefix_projection:
        config.encoder_hidden_size = config.encoder_hidden_size or sizes["token_dim"]


def trained_directly(config: PromptLearningConfig) -> None:
    """Say that a prefix whose projection was baked into its file is trained without it."""
    if isinstance(config, PrefixTuningConfig) and config.prefix_projection:
        logger.warning(
            "the file of a projected prefix holds its keys and values only: they are trained directly from here"
        )
        config.prefix_projection, config.encoder_hidden_size = False, None


def check_prefixed(
    model: PreTrainedModel, facts: Facts, prefixes: Prefixes | None, inputs: dict[str, Any]
) -> None:
    """Refuse arguments of a call that would be misread behind prefixes.

    Raises:
        ConfigError: For attention masks of one's own, and packed rows.
        ContextOverflowError: If prefix and input exceed the context.
    """
    if prefixes is None:
        return
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = inputs.get(name)
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise ConfigError(
                f"{name} must be [B, T] behind a prefix, which each layer masks by its own rule; pass "
                "padding alone"
            )
    positions = inputs.get("position_ids")
    if positions is not None and positions.dim() == 2 and is_packed(positions):
        raise ConfigError(
            "position_ids start again inside a row, and a prefix stands before whole rows; pass each sequence "
            "as a row of its own"
        )
    tokens, mask, limit = _columns(model, facts, inputs)
    counts = [tokens] * len(prefixes.lengths)
    if mask is not None and mask.dim() == 2:
        counts = mask.sum(1).tolist()
    for count, virtual in set(zip(counts, prefixes.lengths.tolist(), strict=True)):
        check_context(int(count), int(virtual), limit)


def _columns(
    model: PreTrainedModel, facts: Facts, inputs: dict[str, Any]
) -> tuple[int, Tensor | None, int | None]:
    """Return the columns behind the prefixes, their mask, and how many the model has."""
    if facts.is_encoder_decoder:
        names = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
        limit, mask = output_limit(model), inputs.get("decoder_attention_mask")
    else:
        names = ("input_ids", "inputs_embeds", "labels")
        limit, mask = facts.context_length, inputs.get("attention_mask")
    found = [inputs[name] for name in names if inputs.get(name) is not None]
    return (int(found[0].shape[1]) if found else 0), mask, limit
