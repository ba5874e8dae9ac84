"""``softprompt.tuners.p_tuning.model``, as PEFT spells it."""

from softprompt.prompts.prompt_encoder import PromptEncoder

__all__ = ["PromptEncoder"]
