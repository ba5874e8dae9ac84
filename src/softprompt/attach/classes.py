"""One class per task type, so that names, ``isinstance`` and pickles read as in PEFT."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from softprompt.attach.model import PeftModel
from softprompt.attach.saving import load_state, state_of
from softprompt.attach.tasks import infer_task
from softprompt.errors import ConfigError
from softprompt.prompts import PeftConfig, TaskType


class PeftModelForCausalLM(PeftModel, task=TaskType.CAUSAL_LM):
    """Prompts on a decoder language model."""


class PeftModelForSeq2SeqLM(PeftModel, task=TaskType.SEQ_2_SEQ_LM):
    """Prompts before the encoder of a seq2seq language model."""


class PeftModelForSequenceClassification(PeftModel, task=TaskType.SEQ_CLS):
    """Prompts and a head that labels whole sequences."""


class PeftModelForTokenClassification(PeftModel, task=TaskType.TOKEN_CLS):
    """Prompts and a head that labels each token; logits cover P + T columns."""


class PeftModelForQuestionAnswering(PeftModel, task=TaskType.QUESTION_ANS):
    """Prompts and a head that points at a span; positions count P + T columns."""


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION):
    """Prompts before a bare encoder or decoder; hidden states cover P + T columns."""


def get_peft_model(
    model: PreTrainedModel, peft_config: PeftConfig, adapter_name: str = "default"
) -> PeftModel:
    """Freeze a model and attach a new prompt.

    Raises:
        ConfigError: If the model or the configuration cannot be used.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"expected a transformers model, got a {type(model).__name__}")
    task = TaskType(peft_config.task_type) if peft_config.task_type else infer_task(model)
    return PeftModel.classes[task](model, peft_config, adapter_name)


def get_peft_model_state_dict(model: PeftModel, adapter_name: str = "default") -> dict[str, Any]:
    """Return what a saved prompt holds: ``prompt_embeddings`` ``[P·S, H]`` and its heads.

    Raises:
        AdapterError: If there is no such prompt.
    """
    return state_of(model, adapter_name)


def set_peft_model_state_dict(
    model: PeftModel, state: dict[str, Any], adapter_name: str = "default"
) -> None:
    """Copy what ``get_peft_model_state_dict`` returned into an attached prompt.

    Raises:
        ArtifactError: If a value is missing, left over, or of another shape.
    """
    load_state(model, adapter_name, state)
