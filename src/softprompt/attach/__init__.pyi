from .cartridges import (
    initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values,
)
from .cartridges import initialize_kv_prefix_from_text as initialize_kv_prefix_from_text
from .classes import get_peft_model as get_peft_model
from .completion import sees_input_of as sees_input_of
from .detached import detached_prompts as detached_prompts
from .generation import prompted_generation as prompted_generation
from .heads import BASE as BASE
from .heads import heads_of as heads_of
from .injection import BatchPrompts as BatchPrompts
from .injection import injected as injected
from .model import PeftModel as PeftModel
from .placing import placement_of as placement_of
from .saving import state_of as state_of
