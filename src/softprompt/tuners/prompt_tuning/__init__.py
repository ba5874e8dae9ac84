"""``softprompt.tuners.prompt_tuning``, as PEFT spells it."""

from softprompt.attach.embedding import PromptEmbedding
from softprompt.prompts.configs import PromptTuningConfig, PromptTuningInit

__all__ = ["PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"]
