"""The former names of this folder, until training needs them no more."""

from softprompt.peft import PeftModel as PeftModel  # noqa: PLC0414
from softprompt.peft import get_peft_model as get_peft_model  # noqa: PLC0414
