"""The new configurations are PEFT's: defaults, files in both directions, and what is refused."""

from __future__ import annotations

import json

import peft
import pytest

import softprompt
from softprompt import (
    CPTConfig,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
    PeftType,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from softprompt.errors import ConfigError

SOURCE = {"prompt_tuning_init_state_dict_path": "source.safetensors"}
CASES = {
    "multitask": ("MultitaskPromptTuningConfig", {}),
    "source": (
        "MultitaskPromptTuningConfig",
        {
            **SOURCE,
            "task_type": "SEQ_2_SEQ_LM",
            "num_virtual_tokens": 4,
            "num_transformer_submodules": 2,
            "prompt_tuning_init": "EXACT_SOURCE_TASK",
            "prompt_tuning_init_task": 2,
            "num_ranks": 3,
            "num_tasks": 2,
            "inference_mode": True,
        },
    ),
    "p-tuning": ("PromptEncoderConfig", {}),
    "lstm": (
        "PromptEncoderConfig",
        {
            "encoder_reparameterization_type": "LSTM",
            "encoder_hidden_size": 7,
            "encoder_num_layers": 3,
            "encoder_dropout": 0.1,
            "num_virtual_tokens": 3,
        },
    ),
    "cpt": ("CPTConfig", {"task_type": "CAUSAL_LM"}),
    "context": (
        "CPTConfig",
        {
            "task_type": "CAUSAL_LM",
            "cpt_token_ids": [4, 5],
            "cpt_tokens_type_mask": [2, 4],
            "opt_weighted_loss_type": "decay",
            "opt_loss_decay_factor": 0.9,
            "tokenizer_name_or_path": "somewhere",
        },
    ),
}


def values(config):
    plain = json.loads(json.dumps(config.to_dict()))
    return {key: value for key, value in plain.items() if key != "peft_version"}


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=list(CASES))
def test_values_and_files_equal_pefts(name, options, tmp_path):
    ours, theirs = getattr(softprompt, name)(**options), getattr(peft, name)(**options)
    assert values(ours) == values(theirs)
    ours.save_pretrained(tmp_path / "ours")
    read = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert type(read) is getattr(peft, name)
    theirs.save_pretrained(tmp_path / "theirs")
    back = softprompt.PeftConfig.from_pretrained(tmp_path / "theirs")
    assert type(back) is getattr(softprompt, name)
    assert values(back) == values(ours) | {"inference_mode": back.inference_mode}


def test_relations_are_pefts():
    assert issubclass(MultitaskPromptTuningConfig, PromptTuningConfig)
    assert issubclass(peft.MultitaskPromptTuningConfig, peft.PromptTuningConfig)
    names = {init.value for init in peft.tuners.MultitaskPromptTuningInit}
    assert names <= {str(init) for init in MultitaskPromptTuningInit}
    config = MultitaskPromptTuningConfig()
    assert config.peft_type is PeftType.MULTITASK_PROMPT_TUNING
    assert config.prompt_tuning_init is MultitaskPromptTuningInit.RANDOM
    assert PromptTuningConfig().peft_type is PeftType.PROMPT_TUNING


def test_the_spelling_of_caikits_document():
    config = MultitaskPromptTuningConfig(prompt_tuning_init="AVERAGE_SOURCE", **SOURCE)
    assert config.prompt_tuning_init is MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS
    assert config.to_dict()["prompt_tuning_init"] == "AVERAGE_SOURCE_TASKS"


def test_a_prompt_for_both_parts_is_pefts():
    config = MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM", output_model_types=["DECODER", "ENCODER"])
    assert config.num_transformer_submodules == 2
    assert config.peft_type is PeftType.MULTITASK_PROMPT_TUNING
    assert "output_model_types" not in config.to_dict()
    assert MultitaskPromptTuningConfig.from_dict(config.to_dict()).num_transformer_submodules == 2


def test_a_finished_prompt_asks_for_no_source():
    MultitaskPromptTuningConfig(prompt_tuning_init="AVERAGE_SOURCE_TASKS", inference_mode=True)
    with pytest.raises(ConfigError) as ours:
        MultitaskPromptTuningConfig(prompt_tuning_init="AVERAGE_SOURCE_TASKS")
    assert str(ours.value) == (
        "prompt_tuning_init_state_dict_path needs to be specified with AVERAGE_SOURCE_TASKS init method"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {**SOURCE, "prompt_tuning_init": "AVERAGE_SOURCE", "task_matrix_init": "normal"},
            "task_matrix_init would be ignored",
        ),
        ({"prompt_tuning_init": "EXACT_SOURCE"}, "did you mean 'EXACT_SOURCE_TASK'"),
        ({"prompt_tuning_init": "TEXT"}, "When prompt_tuning_init='TEXT', tokenizer_name_or_path"),
        ({"task_matrix_init": "zeros"}, "task_matrix_init must be one of ones, normal"),
        ({"num_tasks": 0}, "num_tasks must be at least 1; got 0"),
        ({"num_ranks": None}, "num_ranks takes a whole number; got None"),
        ({"prompt_tuning_init_task": -1}, "prompt_tuning_init_task must be at least 0; got -1"),
        ({"placement": "suffix"}, "leave out placement"),
        ({"prompt_sees_input": False}, "leave out prompt_sees_input"),
        (
            {"task_type": "SEQ_2_SEQ_LM", "output_model_types": ["DECODER"]},
            "leave out output_model_types",
        ),
        (
            {
                "task_type": "SEQ_2_SEQ_LM",
                "output_model_types": ["ENCODER", "DECODER"],
                "num_transformer_submodules": 1,
            },
            "means num_transformer_submodules=2, got 1",
        ),
        ({"parameterization": "residual"}, "parameterization residual is for PROMPT_TUNING"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        MultitaskPromptTuningConfig(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            SOURCE,
            "prompt_tuning_init_state_dict_path would be ignored with prompt_tuning_init RANDOM",
        ),
        ({"prompt_tuning_init_task": 1}, "prompt_tuning_init_task would be ignored"),
        (
            {**SOURCE, "prompt_tuning_init": "AVERAGE_SOURCE", "prompt_tuning_init_task": 1},
            "or use EXACT_SOURCE_TASK",
        ),
    ],
)
def test_settings_that_would_be_ignored_are_taken_as_pefts_and_refused_where_tune_asks(options, message):
    config = MultitaskPromptTuningConfig(**options)
    with pytest.raises(ConfigError, match=message):
        config.refuse_ignored()


def test_methods_are_told_apart():
    values = PromptEncoderConfig(num_virtual_tokens=3).to_dict()
    with pytest.raises(ConfigError, match="expected a CPTConfig, the values are of a PromptEncoderConfig"):
        CPTConfig.from_dict(values)
