"""Checks a prompt's configuration against a base model and fills in the sizes and task that the base implies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from softprompt.backbone import Base, is_bidirectional, start_id
from softprompt.engine.forest import why_not_isolated
from softprompt.errors import ConfigError
from softprompt.prompts import PeftConfig, PeftType, Placement, PrefixTuningConfig, PromptLearningConfig, TaskType


@dataclass(frozen=True, slots=True)
class TaskRules:
    """How models of one task type treat the columns of the virtual tokens.

    Attributes:
        suffix: End of the class name of such models in transformers.
        token_labels: Whether ``labels`` hold one value per token, so the prompt gets -100.
        next_token: Whether a label is predicted by the column before it.
        pooled: Whether one column of a row decides its output: the last real one in decoders, the first
            in encoders, where every row therefore starts.
        span_labels: Whether ``start_positions`` / ``end_positions`` count columns, so they move by P.
        packs: Whether nothing reads an output where the input is padded, so that encoders may run
            without padding; a softmax over the columns (spans) does.
        heads: Modules that are new for the task, trained and saved with the prompt.
    """

    suffix: str
    token_labels: bool = False
    next_token: bool = False
    pooled: bool = False
    span_labels: bool = False
    packs: bool = False
    heads: tuple[str, ...] = ()


TASK_RULES: Mapping[TaskType, TaskRules] = {
    TaskType.CAUSAL_LM: TaskRules("ForCausalLM", token_labels=True, next_token=True),
    TaskType.SEQ_2_SEQ_LM: TaskRules("ForConditionalGeneration"),
    TaskType.SEQ_CLS: TaskRules(
        "ForSequenceClassification", pooled=True, packs=True, heads=("classifier", "score")
    ),
    TaskType.TOKEN_CLS: TaskRules(
        "ForTokenClassification", token_labels=True, packs=True, heads=("classifier", "score")
    ),
    TaskType.QUESTION_ANS: TaskRules("ForQuestionAnswering", span_labels=True, heads=("qa_outputs",)),
    TaskType.FEATURE_EXTRACTION: TaskRules("Model", packs=True),
}


def infer_task(model: PreTrainedModel) -> TaskType:
    """Read the task type from the model's class name.

    Raises:
        ConfigError: If the name says nothing.
    """
    name = type(model).__name__.replace("LMHeadModel", "ForCausalLM")
    for task, rules in TASK_RULES.items():
        if name.endswith(rules.suffix):
            return task
    raise ConfigError(
        f"task_type is missing and {name} does not tell it; set task_type to one of {', '.join(TASK_RULES)}"
    )


def placement_of(config: PromptLearningConfig) -> Placement:
    """Return the placement of a configuration; methods without the option stand in front."""
    return Placement(getattr(config, "placement", Placement.PREFIX))


def sees_input_of(config: PromptLearningConfig) -> bool:
    """Return whether an encoder's prompt attends to the input; methods without the option do."""
    return bool(getattr(config, "prompt_sees_input", True))


def completed(
    config: PeftConfig, base: Base, *, shared: PromptLearningConfig | None = None, own: TaskType | None = None
) -> PromptLearningConfig:
    """Return a copy of ``config`` with the base's sizes, task and heads; the caller's is not changed.

    No pass of the base is run; what only a pass can tell, ``require_isolated`` and ``prefix_path`` do.

    Args:
        config: What the user wrote.
        base: The base.
        shared: Configuration of a prompt that the same model has already.
        own: Task of the prompted model's class.

    Raises:
        BackboneError: If the base does not support keys and values in its layers, and the method needs them.
        ConfigError: If the configuration does not fit the base or the other prompts.
    """
    if not isinstance(config, PromptLearningConfig):
        raise ConfigError(f"expected a PromptTuningConfig, got a {type(config).__name__}")
    task = TaskType(config.task_type) if config.task_type else infer_task(base.model)
    # The task decides which options PEFT lacks.
    config = dataclasses.replace(config, task_type=task)
    if shared is not None:
        _check_shared(config, shared)
    if not sees_input_of(config):
        _check_isolated(base, task)
    if placement_of(config) is not Placement.PREFIX:
        _check_placement(config, base)
    heads = TASK_RULES[task].heads
    if base.is_encoder_decoder and heads:
        raise ConfigError(
            f"task_type {task} needs an encoder or a decoder, {base.facts.architecture} has both; "
            "use SEQ_2_SEQ_LM with the answer as text"
        )
    if own not in (None, task):
        raise ConfigError(f"the model's class takes task_type {own}, got {task}; use get_peft_model")
    if shared is not None and config.keys_and_values != shared.keys_and_values:
        raise ConfigError(
            f"all prompts on one model are prefixes or none is: it has {shared.peft_type}, got "
            f"{config.peft_type}; attach this one to a model of its own"
        )
    if config.keys_and_values:
        _size_key_values(config, base)
    else:
        _size_embeddings(config, base)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = base.model.name_or_path or None
    if heads:
        extra = [name for name in config.modules_to_save or [] if name not in heads]
        config.modules_to_save = [*extra, *heads]
    return config


def _check_shared(config: PromptLearningConfig, shared: PromptLearningConfig) -> None:
    """Refuse a prompt of another task, or another view of the input, than the model's other prompts."""
    if shared.task_type is not config.task_type:
        raise ConfigError(
            f"all prompts on one model share its task_type {shared.task_type}, got {config.task_type}; "
            "attach the other task to a model of its own"
        )
    if sees_input_of(shared) != sees_input_of(config):
        raise ConfigError(
            f"all prompts on one model share prompt_sees_input={sees_input_of(shared)}, got "
            f"{sees_input_of(config)}; attach this one to a model of its own"
        )


def _size_key_values(config: PromptLearningConfig, base: Base) -> None:
    """Fill in the sizes of the base's keys and values.

    Raises:
        BackboneError: If the base keeps something else; whether it can be run behind a prefix, a run finds out.
        ConfigError: If the configuration names other sizes.
    """
    shape = base.key_value_shape
    sizes = {"num_layers": shape.layers, "num_attention_heads": shape.heads, "token_dim": shape.heads * shape.width}
    for name, size in sizes.items():
        given = getattr(config, name)
        # A seq2seq prompt is stored with every second layer empty.
        doubled = name == "num_layers" and base.is_encoder_decoder and given == 2 * size
        if given not in (None, size) and not doubled:
            raise ConfigError(
                f"{name} is {given}, but {base.facts.architecture}'s keys and values need {size}; leave it out, or "
                "use the base the prefix was made for"
            )
        setattr(config, name, size)
    config.num_transformer_submodules = 1
    if isinstance(config, PrefixTuningConfig) and config.prefix_projection:
        config.encoder_hidden_size = config.encoder_hidden_size or sizes["token_dim"]


def _size_embeddings(config: PromptLearningConfig, base: Base) -> None:
    """Fill in the sizes of a prompt that is virtual tokens of the input."""
    facts = base.facts
    config.num_transformer_submodules = _submodules(config, base)
    if config.token_dim not in (None, facts.token_dim):
        raise ConfigError(
            f"token_dim is {config.token_dim}, but {facts.architecture}'s embeddings are "
            f"{facts.token_dim} wide; leave it out, or use the base the prompt was made for"
        )
    config.token_dim = facts.token_dim
    config.num_layers = config.num_layers or facts.num_layers
    config.num_attention_heads = config.num_attention_heads or facts.num_attention_heads
    if getattr(config, "encoder_hidden_size", facts.token_dim) is None:
        setattr(config, "encoder_hidden_size", facts.token_dim)  # noqa: B010 - of some methods only


def _submodules(config: PromptLearningConfig, base: Base) -> int:
    """Return how many parts of the base get virtual tokens of their own (S)."""
    given = config.num_transformer_submodules
    named: list[str] | None = getattr(config, "output_model_types", None)
    if not base.is_encoder_decoder:
        _check_only_part(named, base)
    elif config.task_type is not TaskType.SEQ_2_SEQ_LM:
        _check_no_decoder(named, config)
    elif config.peft_type is PeftType.MULTITASK_PROMPT_TUNING:
        return given or 2
    elif named is None and given == 2:
        return 1  # PEFT's number: of its 2 P virtual tokens the first P are read, before the encoder
    count = len(config.model_types()) if named is not None else 1
    if given not in (None, 1, count):
        raise ConfigError(
            f"num_transformer_submodules={given} adds virtual tokens that nothing reads; leave it out, the "
            "prompt stands in the (encoder's) input, and output_model_types=['ENCODER', 'DECODER'] gives the "
            "decoder one too"
        )
    return count


def _check_only_part(named: list[str] | None, base: Base) -> None:
    """Refuse a part of the base that a model with one input does not have."""
    kind, part = ("encoder", "ENCODER") if is_bidirectional(base.model) else ("causal model", "DECODER")
    if named not in (None, [part]):
        raise ConfigError(
            f"output_model_types of {base.model.config.model_type}, a{'n' if kind[0] == 'e' else ''} {kind}, is "
            f"['{part}'], got {named}; leave it out"
        )


def _check_no_decoder(named: list[str] | None, config: PromptLearningConfig) -> None:
    """Refuse virtual tokens before a decoder whose output the task does not read."""
    if named not in (None, ["ENCODER"]):
        raise ConfigError(
            f"output_model_types {named} needs task_type {TaskType.SEQ_2_SEQ_LM}, got {config.task_type}; "
            "leave it out"
        )


def _check_placement(config: PromptLearningConfig, base: Base) -> None:
    """Refuse a placement that this base, or another option, does not support."""
    if not sees_input_of(config):
        raise ConfigError("prompt_sees_input=False needs placement prefix; leave one of the two out")
    if "ENCODER" not in config.model_types():
        raise ConfigError(
            "placement is about the encoder's input, and output_model_types ['DECODER'] puts nothing there; "
            "leave one of the two out"
        )
    if placement_of(config) is Placement.AFTER_BOS:
        start_id(base.model)


def _check_isolated(base: Base, task: TaskType) -> None:
    """Refuse ``prompt_sees_input=False`` where it changes nothing or is not supported."""
    facts = base.facts
    if not base.is_encoder_decoder and not is_bidirectional(base.model):
        raise ConfigError(
            f"prompt_sees_input=False would be ignored: in {facts.architecture} nothing before the input "
            "sees it anyway; leave it out"
        )
    if TASK_RULES[task].pooled and (facts.positions_from_ids or not facts.accepts_position_ids):
        raise ConfigError(
            f"prompt_sees_input=False needs explicit positions, which {facts.architecture} does not take; "
            "leave it out"
        )


def require_isolated(config: PromptLearningConfig, base: Base) -> None:
    """Check by a pass, once a base, that a prompt which does not see the input can be kept from it.

    Raises:
        ConfigError: If it cannot.
    """
    problem = "" if sees_input_of(config) else why_not_isolated(base)
    if problem:
        raise ConfigError(
            f"prompt_sees_input=False is not supported in {base.facts.architecture}: {problem}; leave it out"
        )
