"""``softprompt.tuners.prefix_tuning``, as PEFT spells it."""

from softprompt.prompts.prefix import PrefixTuningConfig
from softprompt.prompts.prefix_encoder import PrefixEncoder

__all__ = ["PrefixEncoder", "PrefixTuningConfig"]
