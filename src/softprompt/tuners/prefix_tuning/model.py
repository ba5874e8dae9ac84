"""``softprompt.tuners.prefix_tuning.model``, as PEFT spells it."""

from softprompt.prompts.prefix_encoder import PrefixEncoder

__all__ = ["PrefixEncoder"]
