"""The table of rows that a configuration starts from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softprompt.backbone import label_token_ids, text_token_ids
from softprompt.errors import ConfigError
from softprompt.prompts import (
    SOURCE_INITS,
    PromptLearningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    initialisers,
)


def size_of(config: PromptLearningConfig, word_embeddings: nn.Embedding) -> tuple[int, int]:
    """Return rows S·P and width H of a prompt on a base.

    Raises:
        ConfigError: If the config lacks the length or names another width than the base's embedding.
    """
    if config.num_virtual_tokens is None:
        raise ConfigError(
            "num_virtual_tokens is missing; give the length of the prompt, such as 20"
        )
    width = word_embeddings.weight.shape[1]
    if config.token_dim not in (None, width):
        raise ConfigError(
            f"token_dim is {config.token_dim}, but the base's embeddings are {width} wide; leave it out"
        )
    return config.num_virtual_tokens * (config.num_transformer_submodules or 1), width


def initial_table(
    config: PromptTuningConfig,
    word_embeddings: nn.Embedding,
    generator: torch.Generator | None,
) -> nn.Embedding:
    """Return an initialised table ``[S·P, H]`` in float32.

    Under ``inference_mode`` and where a source prompt is about to be copied in nothing is read, and
    the rows are those of RANDOM.

    Raises:
        ConfigError: If the config does not fit the base, or its text cannot be used.
    """
    rows, width = size_of(config, word_embeddings)
    table = nn.Embedding(rows, width, dtype=torch.float32)
    init = config.prompt_tuning_init
    if config.inference_mode or init == PromptTuningInit.RANDOM or init in SOURCE_INITS:
        if generator is not None:
            drawn = initialisers.normal(rows, width, std=1.0, generator=generator)
            table.weight.data.copy_(drawn)
        return table
    submodules = config.num_transformer_submodules or 1
    length = rows // submodules
    # Each part of the model starts at the whole text, not the decoder where the encoder's rows end.
    parts = [_first_rows(config, word_embeddings, length, generator) for _ in range(submodules)]
    table.weight.data.copy_(torch.cat(parts))
    return table


def _first_rows(
    config: PromptTuningConfig,
    table: nn.Embedding,
    length: int,
    generator: torch.Generator | None,
) -> Tensor:
    vocabulary, width = table.weight.shape
    device = table.weight.device

    def embed(ids: Tensor) -> Tensor:
        rows: Tensor = table(ids.to(device))
        return rows

    match config.prompt_tuning_init:
        case PromptTuningInit.TEXT:
            return initialisers.from_tokens(length, text_token_ids(config), embed)
        case PromptTuningInit.LABELS:
            labels = label_token_ids(config)
            return initialisers.from_labels(length, labels, vocabulary, embed, generator=generator)
        case PromptTuningInit.SAMPLE_VOCAB:
            return initialisers.sampled(length, vocabulary, embed, generator=generator)
        case PromptTuningInit.PROMPT:
            raise ConfigError(
                "prompt_tuning_init='PROMPT' needs the base model, to check that the prompt is its own; "
                "use get_peft_model, or add_adapter"
            )
    rms = initialisers.rms(embed, vocabulary)
    return initialisers.normal(length, width, std=rms, generator=generator)
