"""Checking a configuration against the base and filling in what the base knows."""

from __future__ import annotations

import dataclasses

from transformers import PreTrainedModel

from softprompt.attach.placing import placement_of
from softprompt.attach.prefixes import check_kind, sized
from softprompt.attach.tasks import RULES, infer_task
from softprompt.backbone import Base, Facts, start_id
from softprompt.engine import is_bidirectional, why_not_isolated
from softprompt.errors import ConfigError
from softprompt.prompts import (
    PeftConfig,
    PeftType,
    Placement,
    PromptLearningConfig,
    TaskType,
)


def completed(
    config: PeftConfig,
    model: PreTrainedModel,
    facts: Facts,
    *,
    shared: PromptLearningConfig | None,
    own: TaskType | None,
) -> PromptLearningConfig:
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
    if not isinstance(config, PromptLearningConfig):
        raise ConfigError(f"expected a PromptTuningConfig, got a {type(config).__name__}")
    task = TaskType(config.task_type) if config.task_type else infer_task(model)
    # The task decides which options PEFT lacks.
    config = dataclasses.replace(config, task_type=task)
    if shared is not None and shared.task_type is not task:
        raise ConfigError(
            f"all prompts on one model share its task_type {shared.task_type}, got {task}; "
            "attach the other task to a model of its own"
        )
    if shared is not None and sees_input_of(shared) != sees_input_of(config):
        raise ConfigError(
            f"all prompts on one model share prompt_sees_input={sees_input_of(shared)}, got "
            f"{sees_input_of(config)}; attach this one to a model of its own"
        )
    if not sees_input_of(config):
        _check_isolated(model, facts, task)
    if placement_of(config) is not Placement.PREFIX:
        _check_placement(config, model)
    if facts.is_encoder_decoder and RULES[task].heads:
        raise ConfigError(
            f"task_type {task} needs an encoder or a decoder, {facts.architecture} has both; "
            "use SEQ_2_SEQ_LM with the answer as text"
        )
    if own not in (None, task):
        raise ConfigError(
            f"the model's class takes task_type {own}, got {task}; use get_peft_model"
        )
    check_kind(config, shared)
    if config.keys_and_values:
        sized(config, model, facts)
    else:
        _size_rows(config, model, facts)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = model.name_or_path or None
    heads = RULES[task].heads
    if heads:
        extra = [name for name in config.modules_to_save or [] if name not in heads]
        config.modules_to_save = [*extra, *heads]
    return config


def _size_rows(config: PromptLearningConfig, model: PreTrainedModel, facts: Facts) -> None:
    """Fill in the sizes of a prompt that is rows."""
    config.num_transformer_submodules = _submodules(config, model, facts)
    if config.token_dim not in (None, facts.token_dim):
        raise ConfigError(
            f"token_dim is {config.token_dim}, but {facts.architecture}'s embeddings are "
            f"{facts.token_dim} wide; leave it out, or use the base the prompt was made for"
        )
    config.token_dim = facts.token_dim
    config.num_layers = config.num_layers or facts.num_layers
    config.num_attention_heads = config.num_attention_heads or facts.num_attention_heads
    if getattr(config, "encoder_hidden_size", facts.token_dim) is None:
        setattr(config, "encoder_hidden_size", facts.token_dim)  # noqa: B010 - of some kinds only


def sees_input_of(config: PromptLearningConfig) -> bool:
    """Return whether an encoder's prompt attends to the input; kinds without the option do."""
    return bool(getattr(config, "prompt_sees_input", True))


def _submodules(config: PromptLearningConfig, model: PreTrainedModel, facts: Facts) -> int:
    """Return how many parts of the model get virtual tokens of their own (S)."""
    given = config.num_transformer_submodules
    named: list[str] | None = getattr(config, "output_model_types", None)
    if not facts.is_encoder_decoder:
        _check_only_part(named, model)
    elif config.task_type is not TaskType.SEQ_2_SEQ_LM:
        _check_no_decoder(named, config)
    elif config.peft_type is PeftType.MULTITASK_PROMPT_TUNING:
        return given or 2
    count = len(config.model_types()) if named is not None else 1
    if given not in (None, 1, count):
        raise ConfigError(
            f"num_transformer_submodules={given} adds rows that nothing reads; leave it out, the prompt stands "
            "in the (encoder's) input, and output_model_types=['ENCODER', 'DECODER'] gives the decoder one too"
        )
    return count


def _check_only_part(named: list[str] | None, model: PreTrainedModel) -> None:
    """Refuse a part of the model that a model with one input does not have."""
    kind, part = (
        ("encoder", "ENCODER") if is_bidirectional(Base.of(model)) else ("causal model", "DECODER")
    )
    if named not in (None, [part]):
        raise ConfigError(
            f"output_model_types of {model.config.model_type}, a{'n' if kind[0] == 'e' else ''} {kind}, is "
            f"['{part}'], got {named}; leave it out"
        )


def _check_no_decoder(named: list[str] | None, config: PromptLearningConfig) -> None:
    """Refuse virtual tokens before a decoder whose output the task does not read."""
    if named not in (None, ["ENCODER"]):
        raise ConfigError(
            f"output_model_types {named} needs task_type {TaskType.SEQ_2_SEQ_LM}, got {config.task_type}; "
            "leave it out"
        )


def _check_placement(config: PromptLearningConfig, model: PreTrainedModel) -> None:
    """Refuse a placement that this model, or another option, does not support."""
    if not sees_input_of(config):
        raise ConfigError(
            "prompt_sees_input=False needs placement prefix; leave one of the two out"
        )
    if "ENCODER" not in config.model_types():
        raise ConfigError(
            "placement is about the encoder's input, and output_model_types ['DECODER'] puts nothing there; "
            "leave one of the two out"
        )
    if placement_of(config) is Placement.AFTER_BOS:
        start_id(model)


def _check_isolated(model: PreTrainedModel, facts: Facts, task: TaskType) -> None:
    """Refuse ``prompt_sees_input=False`` where it changes nothing or is not supported."""
    if not facts.is_encoder_decoder and not is_bidirectional(Base.of(model)):
        raise ConfigError(
            f"prompt_sees_input=False would be ignored: in {facts.architecture} nothing before the input "
            "sees it anyway; leave it out"
        )
    if RULES[task].pooled and (facts.positions_from_ids or not facts.accepts_position_ids):
        raise ConfigError(
            f"prompt_sees_input=False needs explicit positions, which {facts.architecture} does not take; "
            "leave it out"
        )
    problem = why_not_isolated(Base.of(model))
    if problem:
        raise ConfigError(
            f"prompt_sees_input=False is not supported in {facts.architecture}: {problem}; leave it out"
        )
