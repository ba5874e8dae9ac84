"""``softprompt.tuners.prompt_tuning.model``, as PEFT spells it."""

from softprompt.attach.embedding import PromptEmbedding

__all__ = ["PromptEmbedding"]
