"""The trainable module of prompt tuning."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from softprompt.attach.initial import initial_table
from softprompt.prompts import (
    PROMPT_KEY,
    PromptModule,
    PromptTuningConfig,
    RowParameters,
    check_task,
    reparameterised,
    take_over,
)

logger = logging.getLogger(__name__)


@final
class PromptEmbedding(PromptModule):
    """P trainable rows of a frozen model's embedding space (Lester et al. 2021).

    The rows are ``embedding.weight``, float32 ``[S·P, H]`` whatever the base's dtype: a
    bfloat16 prompt cannot take small steps. With a ``parameterization`` there is no such table
    but ``parameters_of_rows``; what is saved is the rows they make, and rows that are loaded are a
    table again. Under ``inference_mode`` nothing is drawn or read, because the weights are about to
    be loaded.
    """

    embedding: nn.Embedding
    parameters_of_rows: RowParameters | None

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
        table = initial_table(config, word_embeddings, generator)
        loaded_next = config.inference_mode
        self.parameters_of_rows = (
            None if loaded_next else reparameterised(config, table.weight.detach(), generator)
        )
        if self.parameters_of_rows is None:
            self.embedding = table

    def materialize(self, task: int = 0) -> Tensor:
        """Return the prompt's rows ``[S·P, H]``; see ``PromptModule``."""
        check_task(task, self.num_tasks)
        behind = self.parameters_of_rows
        return self.embedding.weight if behind is None else behind.rows()

    def stored(self) -> dict[str, Tensor]:
        """Return what a file holds; see ``PromptModule``."""
        return {PROMPT_KEY: self.materialize().detach().cpu().clone()}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over stored rows, which are trained directly from then on; see ``PromptModule``."""
        behind = self.parameters_of_rows
        if behind is None:
            take_over({PROMPT_KEY: self.embedding.weight}, tensors)
            return
        value = behind.rows().detach().clone()
        take_over({PROMPT_KEY: value}, tensors)
        trains = any(parameter.requires_grad for parameter in behind.parameters())
        length, width = value.shape
        self.embedding = nn.Embedding(length, width, _weight=value, _freeze=not trains)
        self.parameters_of_rows = None
        logger.info(
            "the loaded rows are baked: training goes on with the rows themselves, not %s",
            type(behind).__name__,
        )

    def forward(self, indices: Tensor) -> Tensor:
        """Return rows ``[..., H]`` for indices, as PEFT's module does."""
        return self.materialize()[indices]
