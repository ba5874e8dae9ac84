"""The configuration of P-tuning (Liu et al. 2021, arXiv:2103.10385)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from softprompt.errors import ConfigError
from softprompt.prompts.configs import PromptLearningConfig, configures
from softprompt.prompts.fields import member, number, positive
from softprompt.prompts.kinds import PeftType, PromptEncoderReparameterizationType

_MLP_LAYERS = 2


@configures(PeftType.P_TUNING)
@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Rows that come out of a small network, which is trained with them and dropped when saved."""

    method: ClassVar[PeftType] = PeftType.P_TUNING

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = field(
        default=PromptEncoderReparameterizationType.MLP, metadata={"help": "The network."}
    )
    encoder_hidden_size: int | None = field(
        default=None, metadata={"help": "Width inside the network; None is the embeddings'."}
    )
    encoder_num_layers: int = field(default=_MLP_LAYERS, metadata={"help": "Layers of the LSTM."})
    encoder_dropout: float = field(
        default=0.0, metadata={"help": "Dropout between the LSTM's layers, while training."}
    )

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
            positive("encoder_hidden_size", self.encoder_hidden_size)
        positive("encoder_num_layers", self.encoder_num_layers)
        if not number("encoder_dropout", self.encoder_dropout) < 1:
            raise ConfigError(f"encoder_dropout must be below 1, got {self.encoder_dropout}")
        if not self.inference_mode:
            self._refuse_ignored()

    def _refuse_ignored(self) -> None:
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
