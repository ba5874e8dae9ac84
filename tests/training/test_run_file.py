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
    ],
)
def test_a_wrong_run_file_is_refused(tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_run(path)


def test_a_missing_run_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"could not read .*run\.toml"):
        read_run(tmp_path / "run.toml")
