"""P-tuning: the virtual tokens are the output of a small network that is trained with its input.

``E' = MLP(E)`` or ``E' = MLP(BiLSTM(E))`` with E ``[S·P, H]`` trained; E' ``[S·P, H]`` stands in front of the
input (Liu et al. 2021, arXiv:2103.10385).
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from softprompt.errors import ConfigError
from softprompt.fields import check_number, member, setting
from softprompt.prompts import (
    PROMPT_KEY,
    PeftType,
    PromptEncoderReparameterizationType,
    PromptLearningConfig,
    PromptModule,
    Start,
    check_task,
    drawing_from,
    take_over,
)

logger = logging.getLogger(__name__)

_MLP_LAYERS = 2


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning: embeddings from a small network, which is trained with them and dropped when saved."""

    method: ClassVar[PeftType] = PeftType.P_TUNING

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = setting(
        PromptEncoderReparameterizationType.MLP, "The network."
    )
    encoder_hidden_size: int | None = setting(None, "Width inside the network; None is the embeddings'.")
    encoder_num_layers: int = setting(_MLP_LAYERS, "Layers of the LSTM.")
    encoder_dropout: float = setting(0.0, "Dropout between the LSTM's layers, while training.")

    def __post_init__(self) -> None:
        """Validate the network.

        Raises:
            ConfigError: For sizes that cannot be, or settings that would be ignored.
        """
        super().__post_init__()
        self.peft_type = self.method
        self.encoder_reparameterization_type = member(
            PromptEncoderReparameterizationType,
            "encoder_reparameterization_type",
            self.encoder_reparameterization_type,
        )
        if self.encoder_hidden_size is not None:
            check_number("encoder_hidden_size", int, self.encoder_hidden_size, least=1)
        check_number("encoder_num_layers", int, self.encoder_num_layers, least=1)
        check_number("encoder_dropout", float, self.encoder_dropout, least=0)
        if self.encoder_dropout >= 1:
            raise ConfigError(f"encoder_dropout must be below 1, got {self.encoder_dropout}")

    def build(self, word_embeddings: nn.Embedding, start: Start) -> PromptModule:
        """Return the untrained module; see ``PromptLearningConfig``."""
        _, width = self.table_size(word_embeddings.weight.shape[1])
        sized = self if self.token_dim else dataclasses.replace(self, token_dim=width)
        return PromptEncoder(sized, generator=start.generator)

    def refuse_ignored(self) -> None:
        """Refuse what acts in an LSTM of several layers alone; see ``PromptLearningConfig``."""
        is_mlp = self.encoder_reparameterization_type == PromptEncoderReparameterizationType.MLP
        if is_mlp and self.encoder_num_layers != _MLP_LAYERS:
            raise ConfigError(
                f"encoder_num_layers={self.encoder_num_layers} would be ignored with MLP, whose layers are "
                f"fixed; leave it at {_MLP_LAYERS}, or use LSTM"
            )
        if self.encoder_dropout and (is_mlp or self.encoder_num_layers == 1):
            raise ConfigError(
                f"encoder_dropout={self.encoder_dropout} would be ignored: it acts between the layers of an "
                "LSTM; leave it out, or use LSTM with encoder_num_layers of 2 or more"
            )


@final
class PromptEncoder(PromptModule):
    """Embeddings that a small network makes from trained ones (Liu et al. 2021), under PEFT's attribute names.

    ``embedding`` ``[S·P, H]`` goes through ``mlp_head``, or through ``lstm_head`` and ``mlp_head``. What is
    saved is the outcome; a loaded prompt has no network any more, and training it further trains its embeddings.
    """

    def __init__(self, config: PromptEncoderConfig, *, generator: torch.Generator | None = None) -> None:
        """Create embeddings and network; under ``inference_mode`` only embeddings."""
        super().__init__(config)
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
                if config.encoder_num_layers != _MLP_LAYERS:
                    warnings.warn(
                        f"for {self.encoder_type}, the argument `encoder_num_layers` is ignored. Exactly "
                        f"{_MLP_LAYERS} MLP layers are used.",
                        stacklevel=2,
                    )
                sizes = [width, hidden, hidden, width]
            self.mlp_head = _mlp(sizes)

    def materialize(self, task: int = 0) -> Tensor:
        """Return the embeddings ``[S·P, H]``; an LSTM's dropout acts in training mode; see ``PromptModule``."""
        check_task(task, self.num_tasks)
        return self._encoded(self.embedding.weight)

    def stored(self) -> dict[str, Tensor]:
        """Return the outcome, without dropout; see ``PromptModule``."""
        was_training = self.training
        try:
            self.eval()
            with torch.no_grad():
                value = self.materialize()
        finally:
            self.train(was_training)
        return {PROMPT_KEY: value.detach().cpu().clone()}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Load stored embeddings and drop the network; see ``PromptModule``."""
        take_over({PROMPT_KEY: self.embedding.weight}, tensors)
        if self.mlp_head is not None:
            self.lstm_head = self.mlp_head = None
            logger.info(
                "the loaded embeddings are baked: training goes on with them, without the %s", self.encoder_type
            )

    def forward(self, indices: Tensor) -> Tensor:
        """Return embeddings ``[B, N, H]`` for indices ``[B, N]``, as PEFT's module does."""
        return self._encoded(self.embedding(indices))

    def _encoded(self, embeddings: Tensor) -> Tensor:
        if self.mlp_head is None:
            return embeddings
        if self.lstm_head is not None:
            # cuDNN has no backward outside training mode, where a frozen base often stands.
            refuses = embeddings.is_cuda and not self.training and torch.is_grad_enabled()
            with torch.backends.cudnn.flags(enabled=False) if refuses else nullcontext():
                embeddings = self.lstm_head(embeddings)[0]
        encoded: Tensor = self.mlp_head(embeddings)
        return encoded


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
