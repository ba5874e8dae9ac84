"""What a command says is in the words of the command line, whatever the library calls it."""

from dataclasses import fields

import pytest

from softprompt.cli.main import run
from softprompt.cli.tune import command
from softprompt.errors import ConfigError
from softprompt.training import TuneSettings


@pytest.mark.parametrize(
    ("message", "worded"),
    [
        ("name them with input_field and output_field", "name them with --input-field and --output-field"),
        ("the field 'q' (input_field), got input_fields", "the field 'q' (--input-field), got input_fields"),
        ("seed must be at least 0; got -1", "--seed must be at least 0; got -1"),
        ("the seed of the task; set task to 'generation'", "the seed of the task; set --task to 'generation'"),
        ("start again with overwrite=True", "start again with --overwrite"),
        ("pass --overwrite (overwrite=True in Python)", "pass --overwrite"),
        ("tuning_config.placement is one of a, b", "--placement is one of a, b"),
        ("/x/input_field.jsonl has no 'input_field'", "/x/input_field.jsonl has no 'input_field'"),
        ("expected base_model in softprompt.json to be text", "expected base_model in softprompt.json to be text"),
    ],
)
def test_errors_of_a_command_name_its_options(message, worded):
    assert command.worded(message) == worded


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            ["--system-prompt", "t", "--document", "t"],
            "--document=..., --examples=... to distil, got --sys",
        ),
        (["--document", "t", "--examples", "e"], "got --document=... and --examples=...; give one text"),
    ],
)
def test_two_texts_to_distil_are_named_by_their_options(given, says, tmp_path, capsys):
    assert run(["distill", *given, "--self-study", "2", "--output", str(tmp_path / "o")]) == 2
    assert says in capsys.readouterr().err


def test_every_setting_in_an_error_of_settings_is_an_option():
    """Whatever a setting's own check says on the command line, it says it of the option."""
    for item in fields(TuneSettings):
        if item.name in ("tuning_config", "config"):  # no options: parts of a run file
            continue
        with pytest.raises(ConfigError) as caught:
            TuneSettings.from_dict({item.name: object()})
        assert f"--{item.name.replace('_', '-')} " in command.worded(str(caught.value))


def test_log_lines_of_a_command_name_its_options(capsys, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"input": "a", "output": "b"}\n' * 2)
    words = ["tune", "--train-data", str(tmp_path / "d.jsonl"), "--output", str(tmp_path / "o"), "--dry-run"]
    assert run([*words, "--learning-rate", "1000"]) == 0
    assert "--learning-rate 1000" in capsys.readouterr().err
