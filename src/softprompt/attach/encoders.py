"""Building the trainable module that a configuration describes."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from transformers import PreTrainedModel

from softprompt.attach.embedding import PromptEmbedding
from softprompt.attach.initial import size_of
from softprompt.attach.multitask import MultitaskPromptEmbedding
from softprompt.attach.prefixes import build_prefix
from softprompt.attach.source_prompt import source_of
from softprompt.errors import ConfigError
from softprompt.prompts import (
    CPTConfig,
    CPTEmbedding,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoder,
    PromptEncoderConfig,
    PromptLearningConfig,
    PromptModule,
    PromptTuningConfig,
)


def build_prompt(
    config: PromptLearningConfig,
    word_embeddings: nn.Embedding,
    *,
    generator: torch.Generator | None = None,
    model: PreTrainedModel | None = None,
) -> PromptModule:
    """Return the untrained module of a configuration whose sizes are filled in.

    Args:
        config: What to build.
        word_embeddings: The base's input embedding; gives rows for TEXT and the like.
        generator: Source of randomness; None is torch's global one, as in PEFT.
        model: The base, which reads the text that a prefix starts as.

    Raises:
        ConfigError: If no module belongs to the configuration, or it lacks something.
    """
    module = _built(config, word_embeddings, generator, model)
    module.config = config
    return module


def _built(
    config: PromptLearningConfig,
    word_embeddings: nn.Embedding,
    generator: torch.Generator | None,
    model: PreTrainedModel | None,
) -> PromptModule:
    match config:
        case MultitaskPromptTuningConfig():
            source = source_of(config)
            return MultitaskPromptEmbedding(
                config, word_embeddings, source=source, generator=generator
            )
        case PromptTuningConfig():
            return PromptEmbedding(config, word_embeddings, generator=generator)
        case PromptEncoderConfig():
            _, width = size_of(config, word_embeddings)
            sized = dataclasses.replace(config, token_dim=width)
            return PromptEncoder(sized, generator=generator)
        case PrefixTuningConfig():
            return build_prefix(config, model, generator)
        case CPTConfig():
            size_of(config, word_embeddings)
            return CPTEmbedding(config, word_embeddings)
    raise ConfigError(f"expected the configuration of a prompt, got a {type(config).__name__}")
