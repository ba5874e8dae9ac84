"""``softprompt.tuners.multitask_prompt_tuning``, as PEFT spells it."""

from softprompt.attach.multitask import MultitaskPromptEmbedding
from softprompt.prompts.kinds import MultitaskPromptTuningInit
from softprompt.prompts.multitask import MultitaskPromptTuningConfig

__all__ = ["MultitaskPromptEmbedding", "MultitaskPromptTuningConfig", "MultitaskPromptTuningInit"]
