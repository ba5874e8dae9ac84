"""``softprompt.tuners.prefix_tuning.config``, as PEFT spells it."""

from softprompt.prompts.prefix import PrefixTuningConfig

__all__ = ["PrefixTuningConfig"]
