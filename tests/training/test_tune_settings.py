from dataclasses import fields

import pytest
import torch

from softprompt.engine.choose import ENGINES
from softprompt.errors import ConfigError
from softprompt.training.fields import choices_of, type_of
from softprompt.training.settings import TuneOptions, TuneSettings, TuningConfig


def test_defaults_are_those_of_caikits_document():
    settings = TuneSettings()
    assert (settings.tuning_type, settings.num_epochs, settings.verbalizer) == (
        "PROMPT_TUNING",
        20,
        "{{input}}",
    )
    assert (settings.batch_size, settings.max_source_length, settings.max_target_length) == (
        8,
        256,
        128,
    )
    assert settings.tuning_config.prompt_tuning_init_method == "RANDOM"
    assert (settings.seed, settings.silence_progress_bars) == (73, False)


def test_the_typed_keywords_are_the_fields_and_the_alias():
    names = {item.name for item in fields(TuneSettings)} | {"lr"}
    assert set(TuneOptions.__annotations__) == names


def test_the_engines_are_those_there_are():
    assert choices_of(TuneSettings, "engine") == ENGINES


def test_every_field_has_help():
    for owner in (TuneSettings, TuningConfig):
        for item in fields(owner):
            assert item.name == "tuning_config" or item.metadata["help"].endswith(".")
            assert type_of(owner, item.name) is not None


def test_to_dict_and_back_is_the_same():
    settings = TuneSettings.from_dict(
        {
            "lr": 0.1,
            "torch_dtype": torch.bfloat16,
            "tuning_config": {
                "prompt_tuning_init_method": "TEXT",
                "prompt_tuning_init_text": "hello",
                "output_model_types": ["DECODER"],
            },
        }
    )
    assert settings.learning_rate == 0.1
    assert settings.torch_dtype == "bfloat16"
    assert TuneSettings.from_dict(settings.to_dict()) == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"learning_rte": 0.1},
            r"unknown setting 'learning_rte' \(did you mean 'learning_rate'\?\)",
        ),
        ({"lr": 0.1, "learning_rate": 0.1}, "lr and learning_rate are the same setting"),
        ({"num_virtual_tokens": 8}, "num_virtual_tokens belongs in tuning_config"),
        ({"num_epochs": 0}, "num_epochs must be at least 1; got 0"),
        ({"num_epochs": True}, "num_epochs takes a whole number; got True"),
        ({"num_epochs": "3"}, "num_epochs takes a whole number; got '3'"),
        ({"learning_rate": 0}, "learning_rate must be above 0; got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite"),
        ({"warmup_ratio": 1.5}, "warmup_ratio must be at most 1"),
        ({"keep_best": 1}, "keep_best takes true or false; got 1"),
        ({"verbalizer": 3}, "verbalizer takes a text; got 3"),
        ({"task": "Classification"}, r"did you mean 'classification'\?"),
        ({"tuning_type": "MULTITASK_PROMPT_TUNING"}, "is not available yet; use PROMPT_TUNING"),
        ({"tuning_config": {"num_virtual_token": 3}}, r"did you mean 'num_virtual_tokens'\?"),
        ({"tuning_config": 3}, "tuning_config takes a TuningConfig; got 3"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        TuneSettings.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"prompt_tuning_init_text": "x"},
            "would be ignored with prompt_tuning_init_method RANDOM",
        ),
        ({"prompt_tuning_init_method": "TEXT"}, "TEXT needs a prompt_tuning_init_text; got None"),
        (
            {"prompt_tuning_init_method": "TEXT", "prompt_tuning_init_text": " "},
            "TEXT needs a prompt_tuning_init_text",
        ),
        ({"prompt_tuning_init_source_model": "m"}, "source_model would be ignored"),
        ({"prompt_tuning_init_method": "AVERAGE_SOURCE"}, "needs MULTITASK_PROMPT_TUNING"),
        ({"prompt_tuning_init_method": "ONLY_SOURCE_SHARED"}, "needs MULTITASK_PROMPT_TUNING"),
        ({"prompt_tuning_init_method": "random"}, r"did you mean 'RANDOM'\?"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be at least 1"),
    ],
)
def test_what_a_prompt_would_ignore_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        TuningConfig(**values)


def test_output_model_types_name_the_one_place():
    TuningConfig(output_model_types=["DECODER"]).check_model_types(False)
    TuningConfig(output_model_types=("ENCODER",)).check_model_types(True)
    with pytest.raises(ConfigError, match=r"causal model is \['DECODER'\]; got \['ENCODER'\]"):
        TuningConfig(output_model_types=["ENCODER"]).check_model_types(False)
    with pytest.raises(ConfigError, match=r"seq2seq model is \['ENCODER'\]; got \['DECODER'\]"):
        TuningConfig(output_model_types=["DECODER"]).check_model_types(True)


def test_pefts_enumeration_keeps_its_meaning():
    from softprompt.prompts.configs import PromptTuningInit

    given = TuningConfig(prompt_tuning_init_method=PromptTuningInit.RANDOM)
    assert given.prompt_tuning_init_method == "STANDARD_NORMAL"
    given = TuningConfig(prompt_tuning_init_method=PromptTuningInit.SAMPLE_VOCAB)
    assert given.prompt_tuning_init_method == "SAMPLE_VOCAB"


@pytest.mark.parametrize(
    ("wrong", "near"), [("ouput", "output"), ("validation_dat", "validation_data")]
)
def test_a_misspelt_argument_of_tune_is_named(wrong, near):
    from softprompt.training.tune import tune

    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        tune("demo", [{"input": "a", "output": "b"}], **{wrong: "x"})
