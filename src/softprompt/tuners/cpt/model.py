"""``softprompt.tuners.cpt.model``, as PEFT spells it."""

from softprompt.prompts.cpt_embedding import CPTEmbedding

__all__ = ["CPTEmbedding"]
