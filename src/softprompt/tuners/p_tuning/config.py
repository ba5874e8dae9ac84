"""``softprompt.tuners.p_tuning.config``, as PEFT spells it."""

from softprompt.prompts.kinds import PromptEncoderReparameterizationType
from softprompt.prompts.p_tuning import PromptEncoderConfig

__all__ = ["PromptEncoderConfig", "PromptEncoderReparameterizationType"]
