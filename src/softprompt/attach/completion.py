"""Checking a configuration against the base and filling in what the base knows."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from softprompt.attach.tasks import RULES, infer_task
from softprompt.backbone.facts import Facts
from softprompt.engine.isolation import is_bidirectional, why_not_isolated
from softprompt.errors import ConfigError
from softprompt.prompts.configs import PeftConfig, PromptTuningConfig, TaskType


def completed(
    config: PeftConfig,
    model: PreTrainedModel,
    facts: Facts,
    *,
    shared: PromptTuningConfig | None,
    own: TaskType | None,
) -> PromptTuningConfig:
    """Return a copy of ``config`` with the base's sizes, task and heads; the caller's stays as it is.

    Args:
        config: What the user wrote.
        model: The base.
        facts: Its facts.
        shared: Configuration of a prompt that is already attached.
        own: Task of the prompted model's class.

    Raises:
        ConfigError: If the configuration does not fit the base or the other prompts.
    """
    if not isinstance(config, PromptTuningConfig):
        raise ConfigError(f"expected a PromptTuningConfig, got a {type(config).__name__}")
    task = TaskType(config.task_type) if config.task_type else infer_task(model)
    if shared is not None and shared.task_type is not task:
        raise ConfigError(
            f"all prompts on one model share its task_type {shared.task_type}, got {task}; "
            "attach the other task to a model of its own"
        )
    if shared is not None and shared.prompt_sees_input != config.prompt_sees_input:
        raise ConfigError(
            f"all prompts on one model share prompt_sees_input={shared.prompt_sees_input}, got "
            f"{config.prompt_sees_input}; attach this one to a model of its own"
        )
    if not config.prompt_sees_input:
        _check_isolated(model, facts, task)
    if facts.is_encoder_decoder and RULES[task].heads:
        raise ConfigError(
            f"task_type {task} needs an encoder or a decoder, {facts.architecture} has both; "
            "use SEQ_2_SEQ_LM with the answer as text"
        )
    if own not in (None, task):
        raise ConfigError(
            f"the model's class takes task_type {own}, got {task}; use get_peft_model"
        )
    if (config.num_transformer_submodules or 1) != 1:
        raise ConfigError(
            f"num_transformer_submodules={config.num_transformer_submodules} adds rows that nothing "
            "reads; leave it out, the prompt stands before the (encoder's) input"
        )
    if config.token_dim not in (None, facts.token_dim):
        raise ConfigError(
            f"token_dim is {config.token_dim}, but {facts.architecture}'s embeddings are "
            f"{facts.token_dim} wide; leave it out, or use the base the prompt was made for"
        )
    config = copy.copy(config)
    config.task_type = task
    config.num_transformer_submodules = 1
    config.token_dim = facts.token_dim
    config.num_layers = config.num_layers or facts.num_layers
    config.num_attention_heads = config.num_attention_heads or facts.num_attention_heads
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = model.name_or_path or None
    heads = RULES[task].heads
    if heads:
        extra = [name for name in config.modules_to_save or [] if name not in heads]
        config.modules_to_save = [*extra, *heads]
    return config


def _check_isolated(model: PreTrainedModel, facts: Facts, task: TaskType) -> None:
    """Refuse ``prompt_sees_input=False`` where it changes nothing or cannot be had."""
    if not facts.is_encoder_decoder and not is_bidirectional(model):
        raise ConfigError(
            f"prompt_sees_input=False would be ignored: in {facts.architecture} nothing before the input "
            "sees it anyway; leave it out"
        )
    if RULES[task].pooled and (facts.positions_from_ids or not facts.accepts_position_ids):
        raise ConfigError(
            f"prompt_sees_input=False needs explicit positions, which {facts.architecture} does not take; "
            "leave it out"
        )
    problem = why_not_isolated(model)
    if problem:
        raise ConfigError(
            f"prompt_sees_input=False cannot be had in {facts.architecture}: {problem}; leave it out"
        )
