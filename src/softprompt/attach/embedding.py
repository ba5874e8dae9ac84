"""The trainable module of prompt tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from softprompt.backbone.texts import label_token_ids, text_token_ids
from softprompt.errors import ConfigError
from softprompt.prompts import initialisers
from softprompt.prompts.configs import PromptTuningConfig, PromptTuningInit
from softprompt.prompts.module import PROMPT_KEY, PromptModule, check_task, take_over


@final
class PromptEmbedding(PromptModule):
    """P trainable rows of a frozen model's embedding space (Lester et al. 2021).

    The rows are ``embedding.weight``, float32 ``[P·S, H]`` whatever the base's dtype: a
    bfloat16 prompt cannot take small steps. Under ``inference_mode`` nothing is drawn or
    read, because the weights are about to be loaded.
    """

    def __init__(
        self,
        config: PromptTuningConfig,
        word_embeddings: nn.Embedding,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Create and initialise the rows.

        Args:
            config: What to create; ``num_virtual_tokens`` is needed.
            word_embeddings: The base's embedding module; gives the width, and rows for TEXT and the like.
            generator: Source of randomness; None is torch's global one, as in PEFT.

        Raises:
            ConfigError: If the config lacks the length or names another width than the table's.
        """
        super().__init__()
        if config.num_virtual_tokens is None:
            raise ConfigError(
                "num_virtual_tokens is missing; give the length of the prompt, such as 20"
            )
        vocabulary, width = word_embeddings.weight.shape
        if config.token_dim not in (None, width):
            raise ConfigError(
                f"token_dim is {config.token_dim}, but the base's embeddings are {width} wide; leave it out"
            )
        length = config.num_virtual_tokens * (config.num_transformer_submodules or 1)
        self.embedding = nn.Embedding(length, width, dtype=torch.float32)
        if config.inference_mode or config.prompt_tuning_init is PromptTuningInit.RANDOM:
            if generator is not None:
                rows = initialisers.normal(length, width, std=1.0, generator=generator)
                self.embedding.weight.data.copy_(rows)
            return
        rows = self._first_rows(config, word_embeddings, length, generator)
        self.embedding.weight.data.copy_(rows)

    @staticmethod
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
                return initialisers.from_labels(
                    length, labels, vocabulary, embed, generator=generator
                )
            case PromptTuningInit.SAMPLE_VOCAB:
                return initialisers.sampled(length, vocabulary, embed, generator=generator)
            case PromptTuningInit.PROMPT:
                raise ConfigError(
                    "prompt_tuning_init='PROMPT' needs the base model, to check that the prompt is its own; "
                    "use get_peft_model, or add_adapter"
                )
        rms = initialisers.rms(embed, vocabulary)
        return initialisers.normal(length, width, std=rms, generator=generator)

    def materialize(self, task: int = 0) -> Tensor:
        """Return the prompt's rows ``[S·P, H]``; see ``PromptModule``."""
        check_task(task, self.num_tasks)
        return self.embedding.weight

    def stored(self) -> dict[str, Tensor]:
        """Return what a file holds; see ``PromptModule``."""
        return {PROMPT_KEY: self.embedding.weight.detach().cpu().clone()}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over stored rows; see ``PromptModule``."""
        take_over({PROMPT_KEY: self.embedding.weight}, tensors)

    def forward(self, indices: Tensor) -> Tensor:
        """Return rows ``[..., H]`` for indices, as PEFT's module does."""
        rows: Tensor = self.embedding(indices)
        return rows
