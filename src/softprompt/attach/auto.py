"""Loading a base and its prompt in one call."""

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
)

from softprompt.attach.model import PeftModel
from softprompt.bundled import DEMO, model_directory
from softprompt.errors import ConfigError
from softprompt.prompts import PeftConfig, TaskType

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
