"""From settings to a fresh prompt on the base, started from the seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from softprompt.artifacts import started_prompt
from softprompt.backbone import Base, Facts, Fingerprint
from softprompt.errors import ConfigError
from softprompt.peft import PeftModel, get_peft_model
from softprompt.prompts import (
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
    PromptModule,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
)
from softprompt.training.examples import TaskData
from softprompt.training.settings import TuneSettings
from softprompt.training.source_prompts import SourceInfo, find_source
from softprompt.training.tuning_config import INITS, SOURCE_METHODS, TuningConfig


def attach(base: Base, facts: Facts, data: Sequence[TaskData], settings: TuneSettings) -> PeftModel:
    """Attach a fresh prompt, leaving global randomness untouched.

    Raises:
        ConfigError: a setting that this base or this data has no use for.
    """
    known = {label for task in data for label in task.labels or ()}
    labels = tuple(sorted(known)) or None
    config = (
        multitask_config(base, facts, labels, settings, num_tasks=len(data))
        if settings.multitask
        else plain_config(base, facts, labels, settings)
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = get_peft_model(base.model, config)
    if settings.tuning_config.from_source:
        _forget_source(model)
    return model


def _forget_source(model: PeftModel) -> None:
    """Say RANDOM from now on: a saved prompt must load where its source is not."""
    config = cast(MultitaskPromptTuningConfig, model.peft_config["default"])
    config.prompt_tuning_init = MultitaskPromptTuningInit.RANDOM
    config.prompt_tuning_init_state_dict_path = None
    config.prompt_tuning_init_task = 0


def fresh_prompt(
    base: Base,
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
        return started_prompt(config, base.model).to(base.model.device)


def plain_config(
    base: Base, facts: Facts, labels: tuple[str, ...] | None, settings: TuneSettings
) -> PromptTuningConfig:
    """Return the configuration of plain prompt tuning, whose rows do not come from a source."""
    tuning = settings.tuning_config
    return PromptTuningConfig(
        **_shared_options(base, facts, settings),
        **_first_rows(base, labels, tuning),
        prompt_sees_input=tuning.prompt_sees_input,
        placement=tuning.placement,
        parameterization=tuning.parameterization,
        parameterization_rank=tuning.parameterization_rank,
    )


def multitask_config(
    base: Base,
    facts: Facts,
    labels: tuple[str, ...] | None,
    settings: TuneSettings,
    *,
    num_tasks: int,
) -> MultitaskPromptTuningConfig:
    """Return the configuration of a multitask prompt, from a source prompt where that is set.

    Raises:
        ConfigError: the source prompt does not fit, or a setting that multitask prompts do not have.
    """
    tuning = settings.tuning_config
    first: dict[str, Any] = {}
    if tuning.from_source:
        name = tuning.prompt_tuning_init_source_model or ""
        source = find_source(name, settings.source_prompt_base)
        _check_source(source, base, facts, settings)
        task = tuning.prompt_tuning_init_task
        first = {
            "prompt_tuning_init": SOURCE_METHODS[tuning.prompt_tuning_init_method],
            "prompt_tuning_init_state_dict_path": str(source.weights),
            "prompt_tuning_init_task": 0 if task is None else source.task_number(task),
        }
    return MultitaskPromptTuningConfig(
        **_shared_options(base, facts, settings),
        **(first or _first_rows(base, labels, tuning)),
        prompt_sees_input=tuning.prompt_sees_input,
        placement=tuning.placement,
        num_tasks=num_tasks,
        num_ranks=tuning.num_ranks or 1,
    )


def _check_source(source: SourceInfo, base: Base, facts: Facts, settings: TuneSettings) -> None:
    """Refuse a source of another base or another size.

    Raises:
        ConfigError: saying which setting differs, and what the source has.
    """
    misfit = source.misfit(facts.token_dim, Fingerprint.of(base.model))
    if misfit:
        raise ConfigError(
            f"the source prompt {source.name} does not fit {base.name}: {misfit}; `softprompt "
            "sources list --base-model` shows which do"
        )
    tuning = settings.tuning_config
    needed = tuning.num_virtual_tokens * len(tuning.model_types(facts.is_encoder_decoder))
    if source.virtual_tokens != needed:
        raise ConfigError(
            f"the source prompt {source.name} has {source.virtual_tokens} virtual tokens, this "
            f"prompt needs {needed}; set num_virtual_tokens to the source's"
        )
    ranks = tuning.num_ranks or 1
    takes_tasks = tuning.prompt_tuning_init_method != "ONLY_SOURCE_SHARED"
    if takes_tasks and not source.ranks:
        raise ConfigError(
            f"the source prompt {source.name} is a plain prompt without tasks, which "
            f"{tuning.prompt_tuning_init_method} takes; use ONLY_SOURCE_SHARED"
        )
    if takes_tasks and source.ranks != ranks:
        raise ConfigError(
            f"the source prompt {source.name} has num_ranks {source.ranks}, this prompt {ranks}; set "
            "num_ranks to the source's, or use ONLY_SOURCE_SHARED"
        )


def _first_rows(base: Base, labels: tuple[str, ...] | None, tuning: TuningConfig) -> dict[str, Any]:
    """Return what a configuration says of rows that do not come from a source prompt."""
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
    return {
        "prompt_tuning_init": init.value,
        "prompt_tuning_init_text": text,
        "prompt_tuning_init_prompt": tuning.prompt_tuning_init_prompt,
        "tokenizer_name_or_path": base.name if text or tuning.prompt_tuning_init_prompt else None,
        "tokenizer_kwargs": None if special else {"add_special_tokens": False},
    }


def _shared_options(base: Base, facts: Facts, settings: TuneSettings) -> dict[str, Any]:
    """Return what the configurations of all methods have in common."""
    tuning = settings.tuning_config
    types = tuning.output_model_types
    return {
        "task_type": TaskType.SEQ_2_SEQ_LM if facts.is_encoder_decoder else TaskType.CAUSAL_LM,
        "num_virtual_tokens": tuning.num_virtual_tokens,
        "num_transformer_submodules": len(tuning.model_types(facts.is_encoder_decoder)),
        "output_model_types": None if types is None else list(types),
        "base_model_name_or_path": base.name,
    }
