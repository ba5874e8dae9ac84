from .cartridges import (
    initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values,
)
from .cartridges import initialize_kv_prefix_from_text as initialize_kv_prefix_from_text
from .choosing import RowPrompt as RowPrompt
from .classes import get_peft_model as get_peft_model
from .completion import sees_input_of as sees_input_of
from .detached import prompt_values as prompt_values
from .generation import prompted_generation as prompted_generation
from .heads import BASE as BASE
from .heads import heads_of as heads_of
from .lending import LentPrompts as LentPrompts
from .lending import PromptParts as PromptParts
from .lending import lent as lent
from .model import PeftModel as PeftModel
from .parts import USUAL as USUAL
from .parts import Places as Places
from .parts import places_of as places_of
from .placing import placement_of as placement_of
from .saving import in_our_terms as in_our_terms
from .saving import state_of as state_of
