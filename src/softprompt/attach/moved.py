"""The former names of this folder, until training and inference need them no more."""

from softprompt.engine import BatchPrompts as BatchPrompts
from softprompt.engine import placement_of as placement_of
from softprompt.engine import sees_input_of as sees_input_of
from softprompt.peft import BASE as BASE
from softprompt.peft import PeftModel as PeftModel
from softprompt.peft import get_peft_model as get_peft_model
from softprompt.peft.heads import heads_of as heads_of
from softprompt.peft.saving import state_of as state_of
