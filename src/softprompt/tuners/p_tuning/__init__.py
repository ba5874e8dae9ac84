"""``softprompt.tuners.p_tuning``, as PEFT spells it."""

from softprompt.prompts.kinds import PromptEncoderReparameterizationType
from softprompt.prompts.p_tuning import PromptEncoderConfig
from softprompt.prompts.prompt_encoder import PromptEncoder

__all__ = ["PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"]
