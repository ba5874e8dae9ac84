"""From settings to a fresh prompt on the base, started from the seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from softprompt.attach.classes import get_peft_model
from softprompt.attach.encoders import build_prompt
from softprompt.attach.model import PeftModel
from softprompt.backbone.facts import Facts, input_embedding
from softprompt.backbone.load import LoadedBase
from softprompt.errors import ConfigError
from softprompt.inference.places import Places
from softprompt.prompts.configs import PromptTuningConfig, PromptTuningInit, TaskType
from softprompt.prompts.module import PromptModule
from softprompt.training.examples import TaskData
from softprompt.training.settings import TuneSettings
from softprompt.training.tuning_config import INITS


def places_of(settings: TuneSettings, facts: Facts) -> Places:
    """Return the parts of the model that the prompt feeds."""
    return Places.of(settings.tuning_config.output_model_types, seq2seq=facts.is_encoder_decoder)


def attach(
    base: LoadedBase, facts: Facts, data: Sequence[TaskData], settings: TuneSettings
) -> PeftModel:
    """Attach a fresh prompt, leaving global randomness untouched.

    Raises:
        ConfigError: a setting that this base or this data has no use for.
    """
    labels = {label for task in data for label in task.labels or ()}
    config = plain_config(base, facts, tuple(sorted(labels)) or None, settings)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return get_peft_model(base.model, config)


def fresh_prompt(
    base: LoadedBase,
    facts: Facts,
    labels: tuple[str, ...] | None,
    settings: TuneSettings,
    *,
    number: int = 0,
) -> PromptModule:
    """Build a plain prompt that is not attached; ``number`` makes its random start its own."""
    config = plain_config(base, facts, labels, settings)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed + number)
        return build_prompt(config, input_embedding(base.model)).to(base.model.device)


def plain_config(
    base: LoadedBase, facts: Facts, labels: tuple[str, ...] | None, settings: TuneSettings
) -> PromptTuningConfig:
    """Return the configuration of plain prompt tuning, whose rows do not come from a source."""
    tuning = settings.tuning_config
    init = INITS.get(tuning.prompt_tuning_init_method, PromptTuningInit.RANDOM_SCALED)
    text = tuning.prompt_tuning_init_text
    if init is PromptTuningInit.LABELS:
        if labels is None:
            raise ConfigError(
                "prompt_tuning_init_method LABELS needs a classification task, and the targets "
                "look like free text; set task to 'classification', or use RANDOM"
            )
        text = "\n".join(labels)
    special = tuning.prompt_tuning_init_special_tokens
    return PromptTuningConfig(
        **placed(base, facts, settings),
        prompt_sees_input=tuning.prompt_sees_input,
        placement=tuning.placement,
        parameterization=tuning.parameterization,
        parameterization_rank=tuning.parameterization_rank,
        prompt_tuning_init=init,
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=base.name if text is not None else None,
        tokenizer_kwargs=None if special else {"add_special_tokens": False},
    )


def placed(base: LoadedBase, facts: Facts, settings: TuneSettings) -> dict[str, Any]:
    """Return what the configurations of all methods have in common."""
    tuning = settings.tuning_config
    types = tuning.output_model_types
    return {
        "task_type": TaskType.SEQ_2_SEQ_LM if facts.is_encoder_decoder else TaskType.CAUSAL_LM,
        "num_virtual_tokens": tuning.num_virtual_tokens,
        "num_transformer_submodules": places_of(settings, facts).submodules,
        "output_model_types": None if types is None else list(types),
        "base_model_name_or_path": base.name,
    }
