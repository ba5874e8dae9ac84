"""Which parts of a model a prompt's value goes to."""

from __future__ import annotations

from torch import Tensor

from softprompt.attach.lending import PromptParts
from softprompt.backbone.facts import Facts
from softprompt.engine.rows import is_keys_and_values
from softprompt.prompts.configs import PromptLearningConfig

ENCODER, DECODER = "ENCODER", "DECODER"


def model_types_of(config: PromptLearningConfig, facts: Facts) -> tuple[str, ...]:
    """Return the parts that get a prompt, caikit's ``output_model_types``.

    A causal model has one input, which is its decoder's. A seq2seq prompt with S = 2 feeds both.
    """
    if not facts.is_encoder_decoder:
        return (DECODER,)
    named: list[str] | None = getattr(config, "output_model_types", None)
    if named is not None:
        return tuple(named)
    return (ENCODER, DECODER) if config.num_transformer_submodules == 2 else (ENCODER,)


def split_value(value: Tensor, config: PromptLearningConfig, facts: Facts) -> PromptParts:
    """Return a prompt's value ``[S·P, H]`` by where it goes: the encoder's rows come first."""
    if is_keys_and_values(value):
        return PromptParts(None, prefix=value)
    if not facts.is_encoder_decoder:
        return PromptParts(value)
    match model_types_of(config, facts):
        case (only,):
            return PromptParts(value) if only == ENCODER else PromptParts(None, value)
    half = value.shape[0] // 2
    return PromptParts(value[:half], value[half:])
