"""One class per task type, as in PEFT, and the functions that choose it for a model or a saved prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from softprompt.bundled import DEMO, model_directory
from softprompt.engine import infer_task
from softprompt.errors import ConfigError
from softprompt.peft.model import PeftModel
from softprompt.peft.saving import load_state, state_of
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


_LOADERS: dict[TaskType, Any] = {
    TaskType.CAUSAL_LM: AutoModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: AutoModelForSeq2SeqLM,
    TaskType.SEQ_CLS: AutoModelForSequenceClassification,
    TaskType.TOKEN_CLS: AutoModelForTokenClassification,
    TaskType.QUESTION_ANS: AutoModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: AutoModel,
}


class AutoPeftModel:
    """Loads the base that a saved prompt names, then attaches the prompt."""

    task: ClassVar[TaskType | None] = None

    def __init__(self) -> None:
        raise ConfigError(f"{type(self).__name__} is not instantiated; call its from_pretrained")

    def __init_subclass__(cls, task: TaskType) -> None:
        """Bind a subclass to one task."""
        super().__init_subclass__()
        cls.task = task

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load base and prompt.

        Args:
            pretrained_model_name_or_path: Folder or Hub id of the prompt.
            adapter_name: Name to give the prompt.
            is_trainable: Whether to train it further.
            revision: Revision of the prompt on the Hub.
            **kwargs: What the base's ``from_pretrained`` takes, such as ``dtype``.

        Raises:
            ArtifactError: If the prompt is missing or damaged.
            ConfigError: If it names no base, or is for another task than this class.
        """
        config = PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision)
        if config.task_type is None or config.base_model_name_or_path is None:
            raise ConfigError(
                f"{pretrained_model_name_or_path} names no task_type or base model; "
                "load the base yourself and use PeftModel.from_pretrained"
            )
        task = TaskType(config.task_type)
        if cls.task not in (None, task):
            raise ConfigError(
                f"{cls.__name__} loads task_type {cls.task}, the prompt is for {task}"
            )
        name = config.base_model_name_or_path
        source = str(model_directory()) if name == DEMO else name
        model = _LOADERS[task].from_pretrained(source, revision=config.revision, **kwargs)
        return PeftModel.from_pretrained(
            model, pretrained_model_name_or_path, adapter_name, is_trainable, revision=revision
        )


class AutoPeftModelForCausalLM(AutoPeftModel, task=TaskType.CAUSAL_LM):
    """Loads a decoder language model with its prompt."""


class AutoPeftModelForSeq2SeqLM(AutoPeftModel, task=TaskType.SEQ_2_SEQ_LM):
    """Loads a seq2seq language model with its prompt."""


class AutoPeftModelForSequenceClassification(AutoPeftModel, task=TaskType.SEQ_CLS):
    """Loads a sequence classifier with its prompt and head."""


class AutoPeftModelForTokenClassification(AutoPeftModel, task=TaskType.TOKEN_CLS):
    """Loads a token classifier with its prompt and head."""


class AutoPeftModelForQuestionAnswering(AutoPeftModel, task=TaskType.QUESTION_ANS):
    """Loads a span extractor with its prompt and head."""


class AutoPeftModelForFeatureExtraction(AutoPeftModel, task=TaskType.FEATURE_EXTRACTION):
    """Loads a bare model with its prompt."""
