"""``softprompt.tuners.multitask_prompt_tuning.model``, as PEFT spells it."""

from softprompt.attach.multitask import MultitaskPromptEmbedding

__all__ = ["MultitaskPromptEmbedding"]
