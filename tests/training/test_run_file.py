import tomllib

import pytest

from softprompt.errors import ConfigError
from softprompt.training import TuneSettings, read_run
from softprompt.training.run import write_run


def test_a_run_file_repeats_a_run(tmp_path):
    settings = TuneSettings.from_dict(
        {
            "lr": 1e-5,
            "verbalizer": 'say "{{input}}"\n\tthen \\ \x7f ü 🙂:',
            "keep_best": False,
            "tuning_config": {"num_virtual_tokens": 3, "output_model_types": ["DECODER"]},
        }
    )
    path = tmp_path / "run.toml"
    write_run(path, {"base_model": "demo", "train_data": "a.jsonl"}, settings)
    values = read_run(path)
    assert (values.pop("base_model"), values.pop("train_data")) == ("demo", "a.jsonl")
    assert TuneSettings.from_dict(values) == settings


def test_a_mapping_within_a_table_is_kept(tmp_path):
    space = {"methods": ["cpt"], "odd": {"a b": [1, True], "c": {"d": 'say "x"'}}}
    write_run(tmp_path / "run.toml", {"base_model": "demo", "train_data": "a.jsonl"}, TuneSettings(), space)
    assert tomllib.loads((tmp_path / "run.toml").read_text())["sweep"] == space


def test_what_was_in_memory_is_a_comment(tmp_path):
    path = tmp_path / "run.toml"
    write_run(path, {"base_model": "demo", "train_data": None}, TuneSettings())
    assert "train_data" not in read_run(path)
    assert "# train_data was in memory" in path.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_epoch = 3", r"unknown key 'num_epoch' \(did you mean 'num_epochs'\?\)"),
        ("[tuning_config]\nnum_virtual = 3", r"\[tuning_config\]: unknown key 'num_virtual'"),
        ("tuning_config = 3", "must be a table"),
        ("num_epochs = ", "is not valid TOML"),
        (f"base_model = '{'x' * 100_000}'", "expected the name of a base in .*, got 'xxx"),
        ("learning_rate = inf", "expected plain values within bounds in .*, it has the number inf"),
        ("seed = 1979-05-27", "within bounds in .*, datetime.date.* is a date"),
        ("seed = 9223372036854775808", "it has a number of more than 64 bits"),
        (f"track = {'[' * 40}{']' * 40}", "it is nested more than 32 deep or has more than 100,000 values"),
    ],
)
def test_a_wrong_run_file_is_refused(tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_run(path)


def test_a_missing_run_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file .*run\.toml: check the path"):
        read_run(tmp_path / "run.toml")
