"""``softprompt.tuners.cpt.config``, as PEFT spells it."""

from softprompt.prompts.cpt import CPTConfig

__all__ = ["CPTConfig"]
