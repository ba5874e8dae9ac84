"""``softprompt.tuners.prompt_tuning.config``, as PEFT spells it."""

from softprompt.prompts.configs import PromptTuningConfig, PromptTuningInit

__all__ = ["PromptTuningConfig", "PromptTuningInit"]
