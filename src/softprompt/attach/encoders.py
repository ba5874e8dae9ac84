"""Building the trainable module that a configuration describes."""

from __future__ import annotations

import torch
from torch import nn

from softprompt.attach.embedding import PromptEmbedding
from softprompt.errors import ConfigError
from softprompt.prompts.configs import PromptLearningConfig, PromptTuningConfig
from softprompt.prompts.module import PromptModule


def build_prompt(
    config: PromptLearningConfig,
    word_embeddings: nn.Embedding,
    *,
    generator: torch.Generator | None = None,
) -> PromptModule:
    """Return the untrained module of a configuration whose sizes are filled in.

    Args:
        config: What to build.
        word_embeddings: The base's input embedding; gives rows for TEXT and the like.
        generator: Source of randomness; None is torch's global one, as in PEFT.

    Raises:
        ConfigError: If no module belongs to the configuration, or it lacks something.
    """
    if isinstance(config, PromptTuningConfig):
        return PromptEmbedding(config, word_embeddings, generator=generator)
    raise ConfigError(f"expected the configuration of a prompt, got a {type(config).__name__}")
