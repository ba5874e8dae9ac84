"""``softprompt.tuners.cpt``, as PEFT spells it."""

from softprompt.prompts.cpt import CPTConfig
from softprompt.prompts.cpt_embedding import CPTEmbedding

__all__ = ["CPTConfig", "CPTEmbedding"]
