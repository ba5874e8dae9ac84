"""``softprompt.tuners.multitask_prompt_tuning.config``, as PEFT spells it."""

from softprompt.prompts.kinds import MultitaskPromptTuningInit
from softprompt.prompts.multitask import MultitaskPromptTuningConfig

__all__ = ["MultitaskPromptTuningConfig", "MultitaskPromptTuningInit"]
