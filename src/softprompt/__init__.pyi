from .artifacts.composed import average_prompts as average_prompts
from .artifacts.composed import compose_cartridge_adapters as compose_cartridge_adapters
from .artifacts.composed import concatenate_prompts as concatenate_prompts
from .artifacts.composed import subtract_prompts as subtract_prompts
from .errors import SoftPromptError as SoftPromptError
from .evaluation.evaluate import evaluate as evaluate
from .evaluation.report import Report as Report
from .generation.options import Bounds as Bounds
from .generation.options import GenerationOptions as GenerationOptions
from .generation.ticket import Generation as Generation
from .inference.conversion import convert as convert
from .inference.ensemble import Ensemble as Ensemble
from .inference.loading import load as load
from .inference.loading import load_many as load_many
from .inference.serving import Serving as Serving
from .inference.tuned import TunedPrompt as TunedPrompt
from .inspection.retrieval import similar_prompts as similar_prompts
from .peft.classes import AutoPeftModel as AutoPeftModel
from .peft.classes import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from .peft.classes import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
from .peft.classes import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
from .peft.classes import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
from .peft.classes import (
    AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
)
from .peft.classes import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
from .peft.classes import PeftModel as PeftModel
from .peft.classes import PeftModelForCausalLM as PeftModelForCausalLM
from .peft.classes import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from .peft.classes import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from .peft.classes import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from .peft.classes import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from .peft.classes import PeftModelForTokenClassification as PeftModelForTokenClassification
from .peft.classes import get_peft_model as get_peft_model
from .peft.classes import (
    initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values,
)
from .peft.classes import initialize_kv_prefix_from_text as initialize_kv_prefix_from_text
from .peft.saving import get_peft_model_state_dict as get_peft_model_state_dict
from .peft.saving import set_peft_model_state_dict as set_peft_model_state_dict
from .prompts import CartridgeConfig as CartridgeConfig
from .prompts import CartridgeEncoder as CartridgeEncoder
from .prompts import CPTConfig as CPTConfig
from .prompts import CPTEmbedding as CPTEmbedding
from .prompts import MultitaskPromptEmbedding as MultitaskPromptEmbedding
from .prompts import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
from .prompts import MultitaskPromptTuningInit as MultitaskPromptTuningInit
from .prompts import PeftConfig as PeftConfig
from .prompts import PeftType as PeftType
from .prompts import PrefixEncoder as PrefixEncoder
from .prompts import PrefixTuningConfig as PrefixTuningConfig
from .prompts import PromptEmbedding as PromptEmbedding
from .prompts import PromptEncoder as PromptEncoder
from .prompts import PromptEncoderConfig as PromptEncoderConfig
from .prompts import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
from .prompts import PromptLearningConfig as PromptLearningConfig
from .prompts import PromptTuningConfig as PromptTuningConfig
from .prompts import PromptTuningInit as PromptTuningInit
from .prompts import TaskType as TaskType
from .prompts import (
    prompt_embeddings_from_past_key_values as prompt_embeddings_from_past_key_values,
)
from .training.run import tune as tune
from .training.settings import TuneSettings as TuneSettings
from .training.tuning_config import TuningConfig as TuningConfig

__version__: str
