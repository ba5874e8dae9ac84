"""The configuration that ``tuning_type`` and ``tuning_config`` mean: caikit's names as a table onto PEFT's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from softprompt.errors import ConfigError, nearest
from softprompt.prompts import MultitaskPromptTuningInit, PeftType, PromptLearningConfig, PromptTuningInit, TaskType
from softprompt.prompts import config_class as class_of
from softprompt.training.tuning_config import AUTO, SOURCE_METHODS, TuningConfig

METHODS: Mapping[str, str] = {
    "prompt_tuning": "PROMPT_TUNING",
    "multitask": "MULTITASK_PROMPT_TUNING",
    "p_tuning": "P_TUNING",
    "prefix": "PREFIX_TUNING",
    "cartridge": "CARTRIDGE",
    "cpt": "CPT",
}
"""What ``method`` may be, and the ``tuning_type`` that it stands for."""

MULTITASK, CPT = METHODS["multitask"], METHODS["cpt"]

INITS: Mapping[str, PromptTuningInit] = {
    "RANDOM": PromptTuningInit.RANDOM_SCALED,
    "STANDARD_NORMAL": PromptTuningInit.RANDOM,
    "TEXT": PromptTuningInit.TEXT,
    "SAMPLE_VOCAB": PromptTuningInit.SAMPLE_VOCAB,
    "LABELS": PromptTuningInit.LABELS,
    "PROMPT": PromptTuningInit.PROMPT,
    AUTO: PromptTuningInit.RANDOM_SCALED,
}
"""caikit's names of initialisations, and PEFT's: there RANDOM is N(0, 1). AUTO, or none, is resolved with data."""

_OPTION_OF: Mapping[str, str] = {
    "prompt_tuning_init_method": "prompt_tuning_init",
    "prompt_tuning_init_special_tokens": "prompt_tuning_init",
    "prompt_tuning_init_source_model": "prompt_tuning_init_state_dict_path",
}
"""The option of a configuration that a setting of another name goes into."""

_WORDS: Mapping[str, str] = {
    "prompt_tuning_init": "prompt_tuning_init_method",
    "RANDOM_SCALED": "RANDOM",
    "RANDOM": "STANDARD_NORMAL",
    "tokenizer_kwargs": "prompt_tuning_init_special_tokens",
}
"""Words in the errors of configurations, and caikit's for them."""


@dataclass(frozen=True, slots=True)
class Origins:
    """What a configuration takes from the base, the data or a source prompt.

    The defaults will do to check settings before there are any.

    Attributes:
        tokenizer: Name of the base, whose tokenizer reads initial texts.
        labels: The label set, for LABELS; None where targets are free text.
        task_type: PEFT's task type of the base; None where it is not known yet.
        source: Weights file of the source prompt, and the number of the task to take.
    """

    tokenizer: str = "demo"
    labels: tuple[str, ...] | None = ("label",)
    task_type: str | None = None
    source: tuple[str, int] = ("source", 0)


def configuration_of(tuning: TuningConfig, tuning_type: str, origins: Origins) -> PromptLearningConfig:
    """Return the configuration that settings mean, its sizes not filled in yet.

    Raises:
        ConfigError: The method has no such setting, or the configuration refuses a value.
    """
    kind = class_of(tuning_type)
    _check_known(tuning, tuning_type)
    known = {item.name for item in fields(kind)}
    values = {name: getattr(tuning, name) for name in tuning.given() if name in known}
    if "prompt_tuning_init" in known:
        values |= _initialisation(tuning, origins) | _parts(tuning, origins)
    elif values.keys() & {"prefix_tuning_init_text", "cartridge_init_text"}:
        values["tokenizer_name_or_path"] = origins.tokenizer
    task_type = origins.task_type
    if tuning_type == CPT:
        task_type = task_type or "CAUSAL_LM"
    else:
        values["num_virtual_tokens"] = tuning.num_virtual_tokens
    try:
        config = kind(**values, task_type=task_type)
        config.refuse_ignored()
        return config
    except ConfigError as error:
        raise ConfigError(_in_caikits_words(str(error))) from None


def config_from(values: Mapping[str, Any], tuning_type: str) -> PromptLearningConfig:
    """Return the configuration that plain values mean, as a run file has them.

    Raises:
        ConfigError: There is no such option, or it refuses the value.
    """
    config = PromptLearningConfig.from_dict({"peft_type": tuning_type, **values})
    config.refuse_ignored()
    return config


def plain_config(config: PromptLearningConfig) -> dict[str, Any]:
    """Return the method and the options that are not at their default as plain values."""
    values: dict[str, Any] = {"peft_type": str(config.peft_type)}
    for item in fields(config):
        value = getattr(config, item.name)
        if value is not None and value != item.default:
            values[item.name] = str(value) if isinstance(value, Enum) else value
    return values


def tuning_type_named(method: Any) -> str:
    """Return caikit's name of a method.

    Raises:
        ConfigError: There is no such method.
    """
    if method not in METHODS:
        raise ConfigError(f"method is one of {', '.join(METHODS)}; got {method!r}{nearest(str(method), METHODS)}")
    return METHODS[method]


def tuning_type_of(config: PromptLearningConfig) -> str:
    """Return caikit's name of a configuration's method, or PEFT's where caikit has none."""
    named = str(config.peft_type)
    return METHODS["prompt_tuning"] if named == PeftType.EXTENDED_PROMPT_TUNING else named


def _check_known(tuning: TuningConfig, tuning_type: str) -> None:
    """Refuse a setting that the method does not have."""
    for name in tuning.given():
        if not has_setting(tuning_type, name):
            own = [item.name for item in fields(tuning) if has_setting(tuning_type, item.name)]
            others = " or ".join(each for each in METHODS.values() if has_setting(each, name))
            raise ConfigError(
                f"tuning_config.{name} would be ignored with tuning_type {tuning_type}"
                f"{nearest(name, own)}; set tuning_type {others}, or leave it out"
            )


def has_setting(tuning_type: str, setting: str) -> bool:
    """Return whether a method has the option that a setting goes into."""
    if setting == "num_virtual_tokens":  # CPT's is the length of its context
        return tuning_type != CPT
    option = _OPTION_OF.get(setting, setting)
    return option in {item.name for item in fields(class_of(tuning_type))}


def _initialisation(tuning: TuningConfig, origins: Origins) -> dict[str, Any]:
    """Return the options of the initialisation.

    Raises:
        ConfigError: It needs labels that the data does not have.
    """
    method, text = tuning.prompt_tuning_init_method or AUTO, tuning.prompt_tuning_init_text
    if tuning.from_source:
        path, task = origins.source
        exact = SOURCE_METHODS[method] is MultitaskPromptTuningInit.EXACT_SOURCE_TASK
        return {
            "prompt_tuning_init": str(SOURCE_METHODS[method]),
            "prompt_tuning_init_state_dict_path": path,
            "prompt_tuning_init_task": task if exact else 0,
        }
    if method == "LABELS":
        text = labels_text(origins.labels)
    special = tuning.prompt_tuning_init_special_tokens or method == AUTO
    reads = text or tuning.prompt_tuning_init_prompt or method == "TEXT"
    return {
        "prompt_tuning_init": str(INITS[method]),
        "prompt_tuning_init_text": text,
        "tokenizer_name_or_path": origins.tokenizer if reads else None,
        "tokenizer_kwargs": None if special else {"add_special_tokens": False},
    }


def labels_text(labels: tuple[str, ...] | None) -> str:
    """Return labels as the text of the initialisation LABELS.

    Raises:
        ConfigError: Targets are free text.
    """
    if labels is None:
        raise ConfigError(
            "prompt_tuning_init_method LABELS needs a classification task, and the targets look like "
            "free text; set task to 'classification', or use RANDOM"
        )
    return "\n".join(labels)


def _parts(tuning: TuningConfig, origins: Origins) -> dict[str, Any]:
    """Return the options that say which parts of the base get virtual tokens.

    caikit's default for a seq2seq model is its encoder alone, also for multitask prompts.
    """
    types = tuning.output_model_types
    if isinstance(types, str):
        return {"output_model_types": types}
    named = None if types is None else list(types)
    if origins.task_type is None:
        # DECODER alone is right for causal models, and as long as the base is not known for all.
        return {"output_model_types": None if named == ["DECODER"] else named}
    count = len(named or ("ENCODER",)) if origins.task_type == TaskType.SEQ_2_SEQ_LM else 1
    return {"output_model_types": named, "num_transformer_submodules": count}


def _in_caikits_words(message: str) -> str:
    """Return the error of a configuration in the names of the settings that were used."""
    words = "|".join(_WORDS)
    return re.sub(rf"(?<!\w)({words})(?!\w)", lambda found: _WORDS[found[1]], message)
