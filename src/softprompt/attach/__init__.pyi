from .moved import PeftModel as PeftModel
from .moved import get_peft_model as get_peft_model
