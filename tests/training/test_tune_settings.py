from dataclasses import fields

import pytest
import torch

from softprompt.engine import ENGINES
from softprompt.errors import ConfigError
from softprompt.fields import choices_of, type_of
from softprompt.training import TuneSettings, TuningConfig
from softprompt.training.settings import TuneOptions

SOURCE = {"prompt_tuning_init_source_model": "somewhere"}


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
        (
            {
                "tuning_type": "MULTITASK_PROMPT_TUNING",
                "tuning_config": {
                    "prompt_tuning_init_method": "PROMPT",
                    "prompt_tuning_init_prompt": "x",
                },
            },
            "prompt_tuning_init_method PROMPT starts one task's rows",
        ),
        (
            {
                "tuning_config": {
                    "prompt_tuning_init_method": "PROMPT",
                    "prompt_tuning_init_prompt": "x",
                    "parameterization": "residual",
                }
            },
            "prompt_tuning_init_method PROMPT starts from rows, which parameterization residual",
        ),
        (
            {
                "tuning_type": "MULTITASK_PROMPT_TUNING",
                "tuning_config": {"placement": "suffix"},
            },
            "MULTITASK_PROMPT_TUNING has placement prefix only, as in PEFT, got suffix",
        ),
        (
            {
                "tuning_type": "MULTITASK_PROMPT_TUNING",
                "tuning_config": {"prompt_sees_input": False},
            },
            "has prompt_sees_input true only",
        ),
        ({"tuning_config": {"output_model_types": "DECODER"}}, r"a list, such as \['DECODER'\]"),
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
        ({"tuning_type": "MULTITASK_PROMPT"}, r"did you mean 'MULTITASK_PROMPT_TUNING'\?"),
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
        ({"prompt_tuning_init_method": "AVERAGE_SOURCE"}, "needs a prompt_tuning_init_source"),
        ({"prompt_tuning_init_method": "ONLY_SOURCE_SHARED"}, "needs a prompt_tuning_init_source"),
        (
            {
                "prompt_tuning_init_method": "EXACT_SOURCE_TASK",
                "prompt_tuning_init_source_model": "m",
            },
            "needs a prompt_tuning_init_task",
        ),
        ({"prompt_tuning_init_task": "sst2"}, "prompt_tuning_init_task would be ignored"),
        ({"prompt_tuning_init_special_tokens": False}, "special_tokens would be ignored"),
        ({"parameterization": "low_rank"}, "low_rank needs a parameterization_rank"),
        ({"parameterization_rank": 2}, "parameterization_rank would be ignored"),
        ({"parameterization": "lowrank"}, r"did you mean 'low_rank'\?"),
        ({"placement": "sufix"}, r"did you mean 'suffix'\?"),
        ({"num_ranks": 0}, "num_ranks must be at least 1"),
        ({"prompt_tuning_init_method": "random"}, r"did you mean 'RANDOM'\?"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be at least 1"),
    ],
)
def test_what_a_prompt_would_ignore_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        TuningConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"tuning_config": {"prompt_tuning_init_method": method, **SOURCE}}
        for method in ("AVERAGE_SOURCE", "AVERAGE_SOURCE_TASKS", "ONLY_SOURCE_SHARED")
    ]
    + [
        {"tuning_config": {"num_ranks": 2}},
        {"task_learning_rate": 0.4},
        {"task_sampling": "uniform"},
        {"distillation_weight": 0.5},
        {"task_verbalizers": {"a": "{{input}}"}},
    ],
    ids=lambda values: str(values)[:60],
)
def test_what_belongs_to_multitask_tuning_is_refused_without_it(values):
    TuneSettings.from_dict(values | {"tuning_type": "MULTITASK_PROMPT_TUNING"})
    with pytest.raises(ConfigError, match=r"(needs|set) tuning_type MULTITASK_PROMPT_TUNING"):
        TuneSettings.from_dict(values)


def test_settings_of_several_data_sets_are_refused_with_one():
    mixed = TuneSettings(tuning_type="MULTITASK_PROMPT_TUNING", task_sampling="uniform")
    mixed.check_tasks(["a", "b"])
    with pytest.raises(ConfigError, match="task_sampling would be ignored with one data set"):
        mixed.check_tasks([])
    with pytest.raises(ConfigError, match="need tuning_type MULTITASK_PROMPT_TUNING"):
        TuneSettings().check_tasks(["a", "b"])
    own = TuneSettings(tuning_type="MULTITASK_PROMPT_TUNING", task_verbalizers={"sst": "{{input}}"})
    with pytest.raises(ConfigError, match=r"names the task 'sst' \(did you mean 'sst2'\?\)"):
        own.check_tasks(["sst2", "sms"])


def test_a_source_folder_needs_a_source():
    with pytest.raises(ConfigError, match="source_prompt_base would be ignored"):
        TuneSettings(tuning_type="MULTITASK_PROMPT_TUNING", source_prompt_base="x")


def test_a_parameterization_is_refused_where_there_is_one_already():
    with pytest.raises(ConfigError, match="parameterization residual would be ignored"):
        TuneSettings.from_dict(
            {
                "tuning_type": "MULTITASK_PROMPT_TUNING",
                "tuning_config": {"parameterization": "residual"},
            }
        )


def test_enumerations_of_other_libraries_name_the_tuning_type():
    from softprompt.prompts import PeftType

    found = TuneSettings.from_dict({"tuning_type": PeftType.MULTITASK_PROMPT_TUNING})
    assert found.multitask
    assert found == TuneSettings(tuning_type="MULTITASK_PROMPT_TUNING")


def test_output_model_types_name_the_places_of_the_model():
    TuningConfig(output_model_types=["DECODER"]).check_model_types(False)
    for types in (["ENCODER"], ["DECODER"], ["ENCODER", "DECODER"], ["DECODER", "ENCODER"]):
        TuningConfig(output_model_types=types).check_model_types(True)
    with pytest.raises(ConfigError, match=r"causal model is \['DECODER'\]; got \['ENCODER'\]"):
        TuningConfig(output_model_types=["ENCODER"]).check_model_types(False)
    with pytest.raises(ConfigError, match=r"\['ENCODER', 'DECODER'\]; got \['DECODE'\]"):
        TuningConfig(output_model_types=["DECODE"]).check_model_types(True)
    only = TuningConfig(output_model_types=["DECODER"], placement="suffix")
    with pytest.raises(ConfigError, match="placement suffix would be ignored"):
        only.check_model_types(True)
    only = TuningConfig(output_model_types=["DECODER"], prompt_sees_input=False)
    with pytest.raises(ConfigError, match="prompt_sees_input would be ignored"):
        only.check_model_types(True)


def test_pefts_enumeration_keeps_its_meaning():
    from softprompt.prompts import PromptTuningInit

    given = TuningConfig(prompt_tuning_init_method=PromptTuningInit.RANDOM)
    assert given.prompt_tuning_init_method == "STANDARD_NORMAL"
    given = TuningConfig(prompt_tuning_init_method=PromptTuningInit.SAMPLE_VOCAB)
    assert given.prompt_tuning_init_method == "SAMPLE_VOCAB"


@pytest.mark.parametrize(
    ("wrong", "near"), [("ouput", "output"), ("validation_dat", "validation_data")]
)
def test_a_misspelt_argument_of_tune_is_named(wrong, near):
    from softprompt.training import tune

    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        tune("demo", [{"input": "a", "output": "b"}], **{wrong: "x"})


def test_a_multitask_prompt_does_not_stand_before_the_decoder_alone():
    types = {"output_model_types": ["DECODER"]}
    settings = TuneSettings(tuning_type="MULTITASK_PROMPT_TUNING", tuning_config=types)
    settings.check_model_types(False)
    with pytest.raises(ConfigError, match="add ENCODER, or use PROMPT_TUNING"):
        settings.check_model_types(True)
