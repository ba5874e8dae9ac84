"""The configuration of context-aware prompt tuning (Blau et al. 2024, arXiv:2410.17222)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from softprompt.errors import ConfigError
from softprompt.prompts.configs import PromptLearningConfig, TaskType, configures
from softprompt.prompts.fields import number, positive
from softprompt.prompts.kinds import PeftType

KINDS = 4
"""Token types repeat with this period; see ``CPTConfig``."""
_WEIGHTINGS = ("none", "decay")


@configures(PeftType.CPT)
@dataclass
class CPTConfig(PromptLearningConfig):
    """A context of real tokens, each allowed to move a little from its embedding.

    ``cpt_tokens_type_mask`` says what each token of the context is: 1, 2, 3 and 4 are the template
    before the input, the input, the template before the label and the label of the first example;
    the next example goes on with 5 to 8, and so on; 0 is none of them. Labels do not move; the other
    three move within a ball, whose radius is ``opt_projection_epsilon`` for inputs and
    ``opt_projection_format_epsilon`` for templates, in units of the embedding width over 2048.
    """

    method: ClassVar[PeftType] = PeftType.CPT

    cpt_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Token ids of the context; its length is P."}
    )
    cpt_mask: list[int] | None = field(
        default=None, metadata={"help": "Attention mask of the context; all ones."}
    )
    cpt_tokens_type_mask: list[int] | None = field(
        default=None, metadata={"help": "What each token of the context is."}
    )
    opt_weighted_loss_type: str | None = field(
        default="none", metadata={"help": "Weights of the labels in the loss: none or decay."}
    )
    opt_loss_decay_factor: float | None = field(
        default=1.0, metadata={"help": "Weight of each label relative to the next one, with decay."}
    )
    opt_projection_epsilon: float | None = field(
        default=0.1, metadata={"help": "How far inputs may move."}
    )
    opt_projection_format_epsilon: float | None = field(
        default=0.1, metadata={"help": "How far templates may move."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer the context was made with, for the record."}
    )

    def __post_init__(self) -> None:
        """Fill in and validate the context.

        Raises:
            ConfigError: For another task than CAUSAL_LM, or a context or numbers that cannot be.
        """
        super().__post_init__()
        self.peft_type = self.method
        self.num_transformer_submodules = 1
        if self.task_type != TaskType.CAUSAL_LM:
            raise ConfigError(f"CPTConfig only supports task_type = {TaskType.CAUSAL_LM}.")
        self._check_context()
        if self.opt_weighted_loss_type not in _WEIGHTINGS:
            raise ConfigError(
                f"opt_weighted_loss_type must be one of {', '.join(_WEIGHTINGS)}, got "
                f"{self.opt_weighted_loss_type!r}"
            )
        for name in (
            "opt_loss_decay_factor",
            "opt_projection_epsilon",
            "opt_projection_format_epsilon",
        ):
            number(name, getattr(self, name))
        if not self.inference_mode:
            self._refuse_ignored()

    def _check_context(self) -> None:
        given = self.num_virtual_tokens
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        count = self.num_virtual_tokens = len(self.cpt_token_ids)
        self.cpt_mask = [1] * count if self.cpt_mask is None else self.cpt_mask
        if self.cpt_tokens_type_mask is None:
            self.cpt_tokens_type_mask = [1] * count
        if not count == len(self.cpt_mask) == len(self.cpt_tokens_type_mask):
            raise ConfigError(
                "cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length."
            )
        if count == 0 or given not in (None, count):
            raise ConfigError(
                f"num_virtual_tokens is the length of cpt_token_ids, got {given} and {count} token ids; "
                "leave num_virtual_tokens out, and give at least one token"
            )
        for name in ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"):
            for value in getattr(self, name):
                positive(f"each of {name}", value, least=0)

    def _refuse_ignored(self) -> None:
        if any(value != 1 for value in self.cpt_mask or ()):
            raise ConfigError(
                "cpt_mask must be all ones: a context token with another value would be attended to all the "
                "same; leave such tokens out of cpt_token_ids"
            )
        if self.opt_weighted_loss_type == "none" and self.opt_loss_decay_factor != 1:
            raise ConfigError(
                f"opt_loss_decay_factor={self.opt_loss_decay_factor} would be ignored with "
                "opt_weighted_loss_type none; leave it out, or use decay"
            )
