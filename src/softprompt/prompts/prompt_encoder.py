"""The trainable module of P-tuning."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from softprompt.errors import ConfigError
from softprompt.prompts.kinds import PromptEncoderReparameterizationType
from softprompt.prompts.module import PROMPT_KEY, PromptModule, check_task, take_over
from softprompt.prompts.p_tuning import PromptEncoderConfig
from softprompt.prompts.randomness import drawing_from

logger = logging.getLogger(__name__)


@final
class PromptEncoder(PromptModule):
    """Rows that a small network makes from trained ones (Liu et al. 2021), under PEFT's attribute names.

    ``embedding`` ``[S·P, H]`` goes through ``mlp_head``, or through ``lstm_head`` and ``mlp_head``. What is
    saved is the outcome; a loaded prompt has no network any more, and training it further trains its rows.
    """

    def __init__(
        self, config: PromptEncoderConfig, *, generator: torch.Generator | None = None
    ) -> None:
        """Create rows and network; under ``inference_mode`` only the rows, which are about to be loaded.

        Args:
            config: What to create; ``num_virtual_tokens`` and ``token_dim`` are needed.
            generator: Source of randomness; None is torch's global one, drawn from in PEFT's order.

        Raises:
            ConfigError: If the config lacks a size.
        """
        super().__init__()
        if config.num_virtual_tokens is None or config.token_dim is None:
            raise ConfigError(
                "P-tuning needs num_virtual_tokens and token_dim; give the length of the prompt, such as 20"
            )
        width = config.token_dim
        length = config.num_virtual_tokens * (config.num_transformer_submodules or 1)
        hidden = config.encoder_hidden_size or width
        self.encoder_type = config.encoder_reparameterization_type
        self.lstm_head: nn.LSTM | None = None
        self.mlp_head: nn.Sequential | None = None
        with drawing_from(generator):
            self.embedding = nn.Embedding(length, width, dtype=torch.float32)
            if config.inference_mode:
                return
            if self.encoder_type == PromptEncoderReparameterizationType.LSTM:
                self.lstm_head = nn.LSTM(
                    width,
                    hidden,
                    num_layers=config.encoder_num_layers,
                    dropout=config.encoder_dropout,
                    bidirectional=True,
                    batch_first=True,
                )
                sizes = [2 * hidden, 2 * hidden, width]
            else:
                sizes = [width, hidden, hidden, width]
            self.mlp_head = _mlp(sizes)

    def materialize(self, task: int = 0) -> Tensor:
        """Return the rows ``[S·P, H]``; an LSTM's dropout acts in training mode; see ``PromptModule``."""
        check_task(task, self.num_tasks)
        return self._encoded(self.embedding.weight)

    def stored(self) -> dict[str, Tensor]:
        """Return the outcome, without dropout; see ``PromptModule``."""
        was_training = self.training
        try:
            self.eval()
            with torch.no_grad():
                rows = self.materialize()
        finally:
            self.train(was_training)
        return {PROMPT_KEY: rows.detach().cpu().clone()}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over stored rows and drop the network; see ``PromptModule``."""
        take_over({PROMPT_KEY: self.embedding.weight}, tensors)
        if self.mlp_head is not None:
            self.lstm_head = self.mlp_head = None
            logger.info(
                "the loaded rows are baked: training goes on with them, without the %s",
                self.encoder_type,
            )

    def forward(self, indices: Tensor) -> Tensor:
        """Return rows ``[B, N, H]`` for indices ``[B, N]``, as PEFT's module does."""
        return self._encoded(self.embedding(indices))

    def _encoded(self, rows: Tensor) -> Tensor:
        if self.mlp_head is None:
            return rows
        if self.lstm_head is not None:
            # cuDNN has no backward outside training mode, where a frozen base often stands.
            refuses = rows.is_cuda and not self.training and torch.is_grad_enabled()
            with torch.backends.cudnn.flags(enabled=False) if refuses else nullcontext():
                rows = self.lstm_head(rows)[0]
        encoded: Tensor = self.mlp_head(rows)
        return encoded


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
