"""The configuration is PEFT's: its defaults, its error texts, its file, in both directions."""

from __future__ import annotations

import json

import peft
import pytest

import softprompt
from softprompt import CPTConfig, PeftConfig, PeftType, PromptTuningConfig, PromptTuningInit, TaskType
from softprompt.errors import ArtifactError, ConfigError, SoftPromptError

FULL = {
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 7,
    "prompt_tuning_init": "TEXT",
    "prompt_tuning_init_text": "is it good or bad: ümlaut",
    "tokenizer_name_or_path": "somewhere",
    "tokenizer_kwargs": {"use_fast": True},
    "base_model_name_or_path": "a/base",
    "revision": "main",
    "inference_mode": True,
    "modules_to_save": ["score"],
    "token_dim": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_transformer_submodules": 1,
}


def without_version(config):
    return {key: value for key, value in config.to_dict().items() if key != "peft_version"}


def plain(values):
    return json.loads(json.dumps(values))


@pytest.mark.parametrize("options", [{}, FULL], ids=["defaults", "full"])
def test_values_equal_pefts(options):
    ours, theirs = PromptTuningConfig(**options), peft.PromptTuningConfig(**options)
    assert set(ours.to_dict()) == set(theirs.to_dict())
    assert plain(without_version(ours)) == plain(without_version(theirs))


def test_enumerations_hold_pefts_names():
    assert {str(task) for task in TaskType} == {task.value for task in peft.TaskType}
    assert {init.value for init in peft.PromptTuningInit} <= {str(init) for init in PromptTuningInit}
    config = PromptTuningConfig(task_type="SEQ_CLS", prompt_tuning_init="SAMPLE_VOCAB")
    assert config.task_type is TaskType.SEQ_CLS
    assert config.prompt_tuning_init is PromptTuningInit.SAMPLE_VOCAB
    assert config.peft_type is PeftType.PROMPT_TUNING
    assert config.is_prompt_learning


def test_plain_json_values():
    values = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2).to_dict()
    assert {type(value) for value in values.values()} <= {str, int, bool, type(None)}
    assert values["task_type"] == "CAUSAL_LM"
    assert PromptTuningConfig.from_dict(values).to_dict() == values


TEXT = {"prompt_tuning_init": "TEXT"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {**TEXT, "prompt_tuning_init_text": "x"},
            "When prompt_tuning_init='TEXT', tokenizer_name_or_path can't be None.",
        ),
        (
            {**TEXT, "tokenizer_name_or_path": "x"},
            "When prompt_tuning_init='TEXT', prompt_tuning_init_text can't be None.",
        ),
        (
            {"tokenizer_kwargs": {"use_fast": True}},
            "tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.",
        ),
        ({"task_type": "x"}, "Invalid task type: 'x'."),
    ],
)
def test_error_texts_are_pefts(options, message):
    with pytest.raises(ValueError) as ours:
        PromptTuningConfig(**options)
    with pytest.raises(ValueError) as theirs:
        peft.PromptTuningConfig(**options)
    assert isinstance(ours.value, ConfigError)
    assert str(ours.value).startswith(message)
    assert str(theirs.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tuning_init": "SAMPLE_VOCABULARY"}, "did you mean 'SAMPLE_VOCAB'"),
        ({"prompt_tuning_init": None}, "prompt_tuning_init must be one of"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be at least 1; got 0"),
        ({"num_virtual_tokens": -3}, "got -3"),
        ({"num_virtual_tokens": True}, "got True"),
        ({"num_virtual_tokens": 2.0}, r"got 2\.0"),
        ({"num_virtual_tokens": "20"}, "got '20'"),
        ({"prompt_tuning_init": "LABELS"}, "'LABELS', tokenizer_name_or_path can't be None"),
        (
            {**TEXT, "prompt_tuning_init_text": "x", "tokenizer_name_or_path": ""},
            "tokenizer_name_or_path can't be",
        ),
    ],
)
def test_bad_values_are_refused_in_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        PromptTuningConfig(**options)
    assert "\n" not in str(caught.value)


def test_other_methods_are_refused():
    with pytest.raises(
        ConfigError,
        match=r"peft_type must be one of PROMPT_TUNING, .*, got 'LORA'",
    ):
        PeftConfig(peft_type="LORA")
    with pytest.raises(ConfigError, match="got 'LORA'"):
        PeftConfig.from_dict({"peft_type": "LORA", "r": 8})


@pytest.mark.parametrize("empty", [None, False, 0.0, {}, [], ""])
def test_unset_keys_of_newer_versions_are_accepted(empty):
    values = {**PromptTuningConfig(num_virtual_tokens=3).to_dict(), "from_the_future": empty}
    assert PromptTuningConfig.from_dict(values).num_virtual_tokens == 3


@pytest.mark.parametrize("value", [1, True, "x", ["y"], {"z": None}])
def test_set_keys_we_do_not_know_are_refused(value):
    with pytest.raises(ConfigError, match="did you mean 'num_virtual_tokens'"):
        PromptTuningConfig.from_dict({"num_virtual_token": value})


def test_the_file_names_the_class(tmp_path):
    PromptTuningConfig(**FULL).save_pretrained(tmp_path / "new" / "folder")
    loaded = PeftConfig.from_pretrained(tmp_path / "new" / "folder")
    assert isinstance(loaded, PromptTuningConfig)
    assert loaded == PromptTuningConfig(**FULL)


@pytest.mark.parametrize("options", [{}, FULL], ids=["defaults", "full"])
def test_files_go_both_ways(options, tmp_path):
    PromptTuningConfig(**options).save_pretrained(tmp_path / "ours")
    theirs = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert isinstance(theirs, peft.PromptTuningConfig)
    theirs.save_pretrained(tmp_path / "theirs")
    back = PromptTuningConfig.from_pretrained(tmp_path / "theirs")
    expected = PromptTuningConfig(**{**options, "inference_mode": back.inference_mode})
    assert without_version(back) == without_version(expected)
    assert back.prompt_tuning_init is PromptTuningInit(options.get("prompt_tuning_init", "RANDOM"))


def test_subfolder(tmp_path):
    PromptTuningConfig(num_virtual_tokens=3).save_pretrained(tmp_path / "named")
    loaded = PromptTuningConfig.from_pretrained(tmp_path, subfolder="named")
    assert loaded.num_virtual_tokens == 3


def test_saving_onto_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="should be a directory, not a file"):
        PromptTuningConfig().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"text"', "\x00\x01"])
def test_damaged_files_are_one_clear_error(text, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(SoftPromptError, match=r"adapter_config\.json") as caught:
        PromptTuningConfig.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no/such", "no/such/folder/at/all", "nowhere"])
def test_missing_files_are_one_clear_error(name):
    with pytest.raises(ArtifactError, match=r"Can't find 'adapter_config\.json' at"):
        softprompt.PeftConfig.from_pretrained(name)


def test_a_folder_without_the_file(tmp_path):
    with pytest.raises(ArtifactError, match=r"Can't find 'adapter_config\.json' at"):
        PromptTuningConfig.from_pretrained(tmp_path)


def with_code():
    return PromptTuningConfig(
        **TEXT,
        num_virtual_tokens=3,
        prompt_tuning_init_text="x",
        tokenizer_name_or_path="y",
        tokenizer_kwargs={"trust_remote_code": True, "use_fast": False},
    )


def test_a_user_may_let_a_tokenizer_run_code_and_no_file_may(tmp_path):
    config = with_code()
    assert config.tokenizer_kwargs == {"trust_remote_code": True, "use_fast": False}
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).tokenizer_kwargs == {"use_fast": False}
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text()) | {"tokenizer_kwargs": {"trust_remote_code": True}}
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="must not be able to run code"):
        PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="must not be able to run code"):
        PromptTuningConfig.from_dict(values)
    # A finished prompt reads no tokenizer, whatever PEFT wrote into its file.
    path.write_text(json.dumps(values | {"inference_mode": True}))
    assert not PeftConfig.from_pretrained(tmp_path).tokenizer_kwargs


def test_keys_of_newer_versions_are_left_out_with_a_warning(tmp_path):
    PromptTuningConfig(num_virtual_tokens=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"future": 1, "unset": None}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['future'\] for class PromptTuningConfig"):
        config = PeftConfig.from_pretrained(tmp_path)
    assert config == PromptTuningConfig(num_virtual_tokens=3)
    path.write_text('{"future": 1}')
    with pytest.raises(TypeError, match=r"missing required keys: \{'peft_type'\}"):
        PeftConfig.from_pretrained(tmp_path)


def test_what_only_holds_while_peft_runs_is_left_out_with_its_warning(tmp_path):
    PromptTuningConfig(num_virtual_tokens=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"runtime_config": {"ephemeral_gpu_offload": True}}))
    with pytest.warns(UserWarning, match="The configuration file contains a `runtime_config` key. This is ignored"):
        config = PeftConfig.from_pretrained(tmp_path)
    assert config == PromptTuningConfig(num_virtual_tokens=3)
    assert not config.is_adaption_prompt


def test_a_class_of_any_method_takes_the_name_of_one():
    assert PeftConfig(peft_type="PROMPT_TUNING").peft_type is PeftType.PROMPT_TUNING
    with pytest.raises(ConfigError, match="LORA"):
        PeftConfig(peft_type="LORA")


def test_a_class_that_reads_anothers_file_warns_and_gives_the_other(tmp_path):
    PromptTuningConfig(num_virtual_tokens=3).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="holds a PromptTuningConfig, not a CPTConfig"):
        config = CPTConfig.from_pretrained(tmp_path)
    assert type(config) is PromptTuningConfig


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (PromptTuningConfig, TEXT | {"prompt_tuning_init_text": "x"}),
        (CPTConfig, {"task_type": "CAUSAL_LM", "cpt_token_ids": [1], "cpt_mask": [1], "cpt_tokens_type_mask": [1]}),
    ],
)
def test_paths_are_taken_as_text(kind, options, tmp_path):
    given = options | {"tokenizer_name_or_path": tmp_path / "base", "base_model_name_or_path": tmp_path / "base"}
    config = kind(**given)
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert again.tokenizer_name_or_path == again.base_model_name_or_path == str(tmp_path / "base")
