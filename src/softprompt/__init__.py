"""Prompt tuning for frozen Hugging Face models: train, evaluate, inspect and use soft prompts.

Names are imported when they are first used, so that ``import softprompt`` and
``softprompt --help`` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt.artifacts.composed import (
        average_prompts,
        concatenate_prompts,
        subtract_prompts,
    )
    from softprompt.attach.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from softprompt.attach.classes import (
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )
    from softprompt.attach.embedding import PromptEmbedding
    from softprompt.attach.model import PeftModel
    from softprompt.attach.multitask import MultitaskPromptEmbedding
    from softprompt.errors import SoftPromptError
    from softprompt.evaluation.evaluate import evaluate
    from softprompt.evaluation.report import Report
    from softprompt.inference.continuous.bounds import Bounds
    from softprompt.inference.conversion import convert
    from softprompt.inference.ensemble import Ensemble
    from softprompt.inference.generation import Generation
    from softprompt.inference.loading import load, load_many
    from softprompt.inference.options import GenerationOptions
    from softprompt.inference.serving import Serving
    from softprompt.inference.tuned import TunedPrompt
    from softprompt.inspection.retrieval import similar_prompts
    from softprompt.prompts.configs import (
        PeftConfig,
        PeftType,
        PromptLearningConfig,
        PromptTuningConfig,
        PromptTuningInit,
        TaskType,
    )
    from softprompt.prompts.cpt import CPTConfig
    from softprompt.prompts.cpt_embedding import CPTEmbedding
    from softprompt.prompts.kinds import (
        MultitaskPromptTuningInit,
        PromptEncoderReparameterizationType,
    )
    from softprompt.prompts.multitask import MultitaskPromptTuningConfig
    from softprompt.prompts.p_tuning import PromptEncoderConfig
    from softprompt.prompts.prefix import PrefixTuningConfig
    from softprompt.prompts.prefix_encoder import PrefixEncoder
    from softprompt.prompts.prompt_encoder import PromptEncoder
    from softprompt.training.settings import TuneSettings
    from softprompt.training.tune import tune
    from softprompt.training.tuning_config import TuningConfig

__version__ = "0.1.0"

_HOMES = {
    "softprompt.training.tune": ("tune",),
    "softprompt.training.settings": ("TuneSettings",),
    "softprompt.training.tuning_config": ("TuningConfig",),
    "softprompt.inference.loading": ("load", "load_many"),
    "softprompt.inference.continuous.bounds": ("Bounds",),
    "softprompt.inference.ensemble": ("Ensemble",),
    "softprompt.inspection.retrieval": ("similar_prompts",),
    "softprompt.artifacts.composed": (
        "average_prompts",
        "concatenate_prompts",
        "subtract_prompts",
    ),
    "softprompt.inference.conversion": ("convert",),
    "softprompt.inference.tuned": ("TunedPrompt",),
    "softprompt.inference.serving": ("Serving",),
    "softprompt.inference.generation": ("Generation",),
    "softprompt.inference.options": ("GenerationOptions",),
    "softprompt.evaluation.evaluate": ("evaluate",),
    "softprompt.evaluation.report": ("Report",),
    "softprompt.attach.classes": (
        "get_peft_model",
        "get_peft_model_state_dict",
        "set_peft_model_state_dict",
        "PeftModelForCausalLM",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
        "PeftModelForQuestionAnswering",
        "PeftModelForFeatureExtraction",
    ),
    "softprompt.attach.model": ("PeftModel",),
    "softprompt.attach.embedding": ("PromptEmbedding",),
    "softprompt.attach.auto": (
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForFeatureExtraction",
    ),
    "softprompt.prompts.configs": (
        "PromptTuningConfig",
        "PromptTuningInit",
        "PromptLearningConfig",
        "PeftConfig",
        "PeftType",
        "TaskType",
    ),
    "softprompt.attach.multitask": ("MultitaskPromptEmbedding",),
    "softprompt.prompts.multitask": ("MultitaskPromptTuningConfig",),
    "softprompt.prompts.p_tuning": ("PromptEncoderConfig",),
    "softprompt.prompts.prefix": ("PrefixTuningConfig",),
    "softprompt.prompts.prefix_encoder": ("PrefixEncoder",),
    "softprompt.prompts.prompt_encoder": ("PromptEncoder",),
    "softprompt.prompts.cpt": ("CPTConfig",),
    "softprompt.prompts.cpt_embedding": ("CPTEmbedding",),
    "softprompt.prompts.kinds": (
        "MultitaskPromptTuningInit",
        "PromptEncoderReparameterizationType",
    ),
    "softprompt.errors": ("SoftPromptError",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "Bounds",
    "CPTConfig",
    "CPTEmbedding",
    "Ensemble",
    "Generation",
    "GenerationOptions",
    "MultitaskPromptEmbedding",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "Report",
    "Serving",
    "SoftPromptError",
    "TaskType",
    "TuneSettings",
    "TunedPrompt",
    "TuningConfig",
    "average_prompts",
    "concatenate_prompts",
    "convert",
    "evaluate",
    "get_peft_model",
    "get_peft_model_state_dict",
    "load",
    "load_many",
    "set_peft_model_state_dict",
    "similar_prompts",
    "subtract_prompts",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'softprompt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*globals(), *__all__])
