from .adapters import BASE as BASE
from .classes import AutoPeftModel as AutoPeftModel
from .classes import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from .classes import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
from .classes import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
from .classes import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
from .classes import (
    AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
)
from .classes import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
from .classes import PeftModel as PeftModel
from .classes import PeftModelForCausalLM as PeftModelForCausalLM
from .classes import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from .classes import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from .classes import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from .classes import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from .classes import PeftModelForTokenClassification as PeftModelForTokenClassification
from .classes import get_peft_model as get_peft_model
from .classes import (
    initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values,
)
from .classes import initialize_kv_prefix_from_text as initialize_kv_prefix_from_text
from .saving import get_peft_model_state_dict as get_peft_model_state_dict
from .saving import set_peft_model_state_dict as set_peft_model_state_dict
