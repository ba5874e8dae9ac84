"""Prefix tuning: the prompt is keys and values of every layer, not rows of the input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from softprompt.errors import ConfigError, nearest
from softprompt.prompts.configs import PromptLearningConfig, configures
from softprompt.prompts.fields import positive
from softprompt.prompts.kinds import PeftType, TaskType


@configures(PeftType.PREFIX_TUNING)
@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning (Li and Liang 2021): keys and values ``[L, 2, A_kv, P, D]``, at positions 0 to P - 1.

    The settings of the text, and ``freeze_first_token``, only matter when a prefix is made, so they are
    no part of its file.

    ``token_dim`` is A_kv times D and ``num_attention_heads`` is A_kv, as PEFT writes them for
    grouped queries. For seq2seq models the prefix stands before the decoder's own tokens.
    """

    keys_and_values: ClassVar[bool] = True

    init_weights: str | None = field(
        default=None, metadata={"help": 'First values: "zero", or random when left out.'}
    )
    encoder_hidden_size: int | None = field(
        default=None, metadata={"help": "Inner width of the projection."}
    )
    prefix_projection: bool = field(
        default=False, metadata={"help": "Train a small network in the place of the values."}
    )
    prefix_tuning_init_text: str | None = field(
        default=None,
        metadata={"help": "Text whose keys and values the prefix starts as.", "ours": True},
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer of the text.", "ours": True}
    )
    tokenizer_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Keyword arguments of the tokenizer.", "ours": True}
    )
    freeze_first_token: bool = field(
        default=False,
        metadata={
            "help": "Keep the first token of the text, which attention rests on, as it is.",
            "ours": True,
        },
    )

    def __post_init__(self) -> None:
        """Validate the initialisation.

        Raises:
            ConfigError: For an unknown initialisation, or settings that lack others or would be ignored.
        """
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING
        if self.init_weights not in (None, "zero"):
            raise ConfigError(
                f'init_weights must be "zero" or None, got {self.init_weights!r}'
                f"{nearest(str(self.init_weights), ['zero'])}"
            )
        if self.encoder_hidden_size is not None:
            positive("encoder_hidden_size", self.encoder_hidden_size)
            # PEFT's files carry the size whether it is used or not.
            if not self.prefix_projection and not self.inference_mode:
                raise ConfigError(
                    "encoder_hidden_size would be ignored without prefix_projection=True; set that, or "
                    "leave it out"
                )
        self._check_text()

    def _check_text(self) -> None:
        given = self.prefix_tuning_init_text is not None
        if given and not self.tokenizer_name_or_path:
            raise ConfigError(
                "prefix_tuning_init_text needs tokenizer_name_or_path; name the base's tokenizer"
            )
        for name in ("tokenizer_name_or_path", "tokenizer_kwargs", "freeze_first_token"):
            if getattr(self, name) and not given:
                raise ConfigError(
                    f"{name} would be ignored without prefix_tuning_init_text; give the text, or leave it out"
                )
        for name in ("init_weights", "prefix_projection"):
            if getattr(self, name) and given:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} does not go with prefix_tuning_init_text, whose keys "
                    "and values are the first values; leave one of them out"
                )
        if (self.tokenizer_kwargs or {}).get("trust_remote_code"):
            raise ConfigError(
                "tokenizer_kwargs may not hold trust_remote_code: a prompt must not be able to run code"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields under PEFT's keys.

        PEFT hands a seq2seq decoder every second of its layers, so its file names twice as many.
        """
        values = PromptLearningConfig.to_dict(self)
        if self.task_type is TaskType.SEQ_2_SEQ_LM and self.num_layers is not None:
            values |= {"num_layers": 2 * self.num_layers, "num_transformer_submodules": 2}
        return values
