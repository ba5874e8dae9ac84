from dataclasses import fields

import pytest
import torch

from softprompt.backbone import load_base
from softprompt.engine import ENGINES, completed
from softprompt.errors import ConfigError
from softprompt.fields import choices_of, type_of
from softprompt.prompts import PrefixTuningConfig, PromptLearningConfig, config_class
from softprompt.training import TuneSettings, TuningConfig
from softprompt.training.configuration import METHODS, Origins
from softprompt.training.keywords import TuneOptions

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
    assert settings.tuning_config.prompt_tuning_init_method is None  # RANDOM for labels: test_automatic_start
    assert (settings.seed, settings.silence_progress_bars) == (73, False)


def test_the_typed_keywords_are_the_fields_and_the_alias():
    names = {item.name for item in fields(TuneSettings)} | {"lr", "method", "init"}
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
            "prompt_tuning_init_method must be one of TEXT, .*, got 'PROMPT'",
        ),
        (
            {
                "tuning_config": {
                    "prompt_tuning_init_method": "PROMPT",
                    "prompt_tuning_init_prompt": "x",
                    "parameterization": "residual",
                }
            },
            "prompt_tuning_init_method='PROMPT' starts at embeddings, which parameterization residual",
        ),
        (
            {
                "tuning_type": "MULTITASK_PROMPT_TUNING",
                "tuning_config": {"placement": "suffix"},
            },
            "as in PEFT; leave out placement, or use PROMPT_TUNING",
        ),
        (
            {
                "tuning_type": "MULTITASK_PROMPT_TUNING",
                "tuning_config": {"prompt_sees_input": False},
            },
            "as in PEFT; leave out prompt_sees_input, or use PROMPT_TUNING",
        ),
        ({"tuning_config": {"output_model_types": "DECODER"}}, r"a list, such as \['DECODER'\]"),
        ({"lr": 0.1, "learning_rate": 0.1}, "lr=0.1 and learning_rate=0.1 are the same setting"),
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
            "would be ignored; set prompt_tuning_init_method TEXT or AUTO, or leave it out",
        ),
        ({"prompt_tuning_init_method": "TEXT"}, "'TEXT', prompt_tuning_init_text can't be None"),
        (
            {"prompt_tuning_init_method": "TEXT", "prompt_tuning_init_text": " "},
            "'TEXT', prompt_tuning_init_text can't be",
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
        (
            {"parameterization": "low_rank"},
            "parameterization_rank of low_rank takes a whole number; got None",
        ),
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
        TuneSettings(tuning_config=values)


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
    with pytest.raises(ConfigError, match="parameterization residual is for PROMPT_TUNING"):
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


def completed_for(folder, **values):
    """Return the configuration of settings on a base, as a run makes it."""
    base = load_base(folder)
    settings = TuneSettings.from_dict(values)
    task = "SEQ_2_SEQ_LM" if base.is_encoder_decoder else "CAUSAL_LM"
    return completed(settings.configuration(Origins(task_type=task)), base)


def test_output_model_types_name_the_parts_of_the_model(bases):
    def check(base, types, **tuning):
        tuning = {"output_model_types": types, **tuning}
        return completed_for(bases / base, tuning_config=tuning)

    check("llama", ["DECODER"])
    for types in (["ENCODER"], ["DECODER"], ["ENCODER", "DECODER"], ["DECODER", "ENCODER"]):
        assert check("bart", types).model_types() == tuple(sorted(types, reverse=True))
    with pytest.raises(ConfigError, match=r"causal model, is \['DECODER'\], got \['ENCODER'\]"):
        check("llama", ["ENCODER"])
    with pytest.raises(ConfigError, match=r"\['ENCODER', 'DECODER'\], got \['DECODE'\]"):
        check("bart", ["DECODE"])
    with pytest.raises(ConfigError, match="placement is about the encoder's input"):
        check("bart", ["DECODER"], placement="suffix")
    with pytest.raises(ConfigError, match="prompt_sees_input would be ignored"):
        check("bart", ["DECODER"], prompt_sees_input=False)


def test_pefts_enumeration_keeps_its_meaning():
    from softprompt.prompts import PromptTuningInit

    given = TuningConfig(prompt_tuning_init_method=PromptTuningInit.RANDOM)
    assert given.prompt_tuning_init_method == "STANDARD_NORMAL"
    given = TuningConfig(prompt_tuning_init_method=PromptTuningInit.SAMPLE_VOCAB)
    assert given.prompt_tuning_init_method == "SAMPLE_VOCAB"


@pytest.mark.parametrize(("wrong", "near"), [("ouput", "output"), ("validation_dat", "validation_data")])
def test_a_misspelt_argument_of_tune_is_named(wrong, near):
    from softprompt.training import tune

    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        tune("demo", [{"input": "a", "output": "b"}], **{wrong: "x"})


def test_a_multitask_prompt_does_not_stand_before_the_decoder_alone(bases):
    values = {
        "tuning_type": "MULTITASK_PROMPT_TUNING",
        "tuning_config": {"output_model_types": ["DECODER"]},
    }
    completed_for(bases / "llama", **values)
    with pytest.raises(ConfigError, match="leave out output_model_types, or use PROMPT_TUNING"):
        completed_for(bases / "bart", **values)


METHOD_SETTINGS = {
    "prompt_tuning": {"parameterization": "low_rank", "parameterization_rank": 2},
    "multitask": {"num_ranks": 2, "task_matrix_init": "normal"},
    "p_tuning": {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.1},
    "prefix": {"prefix_projection": True, "encoder_hidden_size": 9},
    "cartridge": {"num_frozen_tokens": 2},
    "cpt": {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.9},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_its_own_settings_and_no_others(method):
    own = METHOD_SETTINGS[method]
    settings = TuneSettings.from_dict({"method": method, "tuning_config": own})
    config = settings.configuration(Origins())
    assert settings.tuning_type == METHODS[method] == config.peft_type
    assert {name: getattr(config, name) for name in own} == own
    assert TuneSettings.from_dict(settings.to_dict()) == settings
    for other, values in METHOD_SETTINGS.items():
        if other == method or (other, method) == ("prompt_tuning", "multitask"):
            continue
        named = r"tuning_config\.\w+ would be ignored with tuning_type " + METHODS[method]
        with pytest.raises(ConfigError, match=named):
            TuneSettings.from_dict({"method": method, "tuning_config": values})


def test_every_option_of_every_method_can_be_set():
    """By the configuration's name, or one of caikit's; context and sizes are read, not set."""
    ours = {item.name for item in fields(TuningConfig)} | {
        "prompt_tuning_init",  # prompt_tuning_init_method
        "prompt_tuning_init_state_dict_path",  # prompt_tuning_init_source_model
        "tokenizer_kwargs",  # prompt_tuning_init_special_tokens
        "num_tasks",  # as many as there are data sets
        "tokenizer_name_or_path",
        "cpt_token_ids",
        "cpt_mask",
        "cpt_tokens_type_mask",
    }
    shared = {item.name for item in fields(PromptLearningConfig)}
    for tuning_type in METHODS.values():
        assert {item.name for item in fields(config_class(tuning_type))} - shared <= ours


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "prefx"}, r"method is one of prompt_tuning, .*did you mean 'prefix'\?"),
        ({"method": "cpt", "tuning_type": "CPT"}, "method=.cpt. and tuning_type=.CPT. are the same setting"),
        ({"method": "cpt", "config": PrefixTuningConfig()}, "config is of PREFIX_TUNING"),
        (
            {"config": PrefixTuningConfig(), "tuning_config": {"num_virtual_tokens": 3}},
            "config and tuning_config both say",
        ),
        ({"config": PrefixTuningConfig(inference_mode=True)}, "leave inference_mode out"),
        ({"config": 3}, "config takes a PromptLearningConfig; got 3"),
        ({"config": {"num_virtual_token": 3}}, r"did you mean 'num_virtual_tokens'\?"),
        ({"context_records": 2}, "context_records would be ignored .* set tuning_type CPT"),
        ({"init_from_records": False}, "set tuning_type PREFIX_TUNING or CARTRIDGE"),
        (
            {"method": "cartridge", "tuning_config": {"num_frozen_tokens": 21}},
            "num_frozen_tokens must be at most num_virtual_tokens=20, got 21",
        ),
        ({"method": "cpt", "tuning_config": {"num_virtual_tokens": 3}}, "would be ignored"),
    ],
)
def test_what_contradicts_a_method_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        TuneSettings.from_dict(values)


def test_a_configuration_is_copied_and_written_plainly():
    given = PrefixTuningConfig(num_virtual_tokens=3, init_weights="zero")
    settings = TuneSettings(config=given)
    assert settings.tuning_type == "PREFIX_TUNING"
    assert settings.configuration(Origins()) == given
    assert settings.configuration(Origins()) is not given
    values = settings.to_dict()
    assert "tuning_config" not in values
    assert values["config"] == {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": 3,
        "init_weights": "zero",
    }
    assert TuneSettings.from_dict(values) == settings
